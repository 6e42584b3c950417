"""The Triton kernels on a GPU, each compared with its reference first, to the bit, and then timed:

* the counts of an image (see `benchmarks.counting`) from logits on the GPU, against plain PyTorch
  there, and against our kernel on the processor, to which the logits must go;
* the crops of a batch of 12 pictures of 2048 x 1024 in the paper's protocol, from pixels in pinned
  memory to a batch on the GPU, against resizing on the processor, on one thread as a loader does.

The limit is the time of what must go through the GPU's memory, or over to it. How long the kernels
alone take stands in the JSON, also with other numbers of pixels and of warps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import counting
from benchmarks.gpu import NO_GPU, copy_bandwidth, in_short, kernel_seconds, transfer_bandwidth
from benchmarks.measure import Absent, Found, compare, time_text, waited
from hpc.allocator import keep_freed_memory
from jobs.augment import Bytes, Draw, Unresized, draw_view
from jobs.batches import Batch, UnresizedBatch
from jobs.crop_window import Window
from jobs.fused_counts import count_upsampled
from jobs.protocol import Protocol

BLOCKS, WARPS = (128, 256, 512, 1024, 2048), (1, 2, 4, 8)
TILES = ((4, 64), (8, 64), (16, 64), (8, 128), (4, 128), (16, 32))
PICTURE = 1024, 2048
Sample = tuple[Window, Bytes, Bytes]


def measure() -> Iterator[Found]:
    """Both kernels."""
    if not torch.cuda.is_available():
        yield Absent("Triton kernels", "their references", NO_GPU)
        return
    keep_freed_memory()
    device = torch.device("cuda")
    yield from of_counting(device)
    yield from of_crops(device, Protocol(batch_size=12), PICTURE)


def of_counting(
    device: torch.device,
    strided: tuple[int, int] = counting.STRIDED,
    size: tuple[int, int] = counting.SIZE,
) -> list[Found]:
    """The counts of one image."""
    from jobs import triton_counts as kernel  # Triton is only where it is wanted

    threads = os.cpu_count() or 1
    image, target = counting.an_image(strided, size)
    logits, there = image.to(device), target.to(device)
    ours = partial(kernel.count_on_gpu, logits, target, counting.BINS)
    reference = count_upsampled(image, target, counting.BINS, threads)
    assert ours().equals(reference)
    more = {}
    if device.type == "cuda":
        more = {
            f"{block} pixels, {warps} warps: kernel, µs": variant(
                kernel, warps, {"BLOCK": block}, ours, reference.equals, "count_pixels"
            )
            for block in BLOCKS
            for warps in WARPS
        }
    return [
        *compare(
            f"{counting.WHAT}, on a GPU", waited(ours, device),
            {
                "plain PyTorch there": (
                    waited(partial(counting.plain, logits, there), device), 0.0,
                ),
                "our kernel on the processor": (
                    partial(count_upsampled, logits, target, counting.BINS, threads), 0.0,
                ),
            },
            limit=_memory_limit(4 * image.numel() + target.numel(), device), more=more,
        ),
    ]  # fmt: skip


def of_crops(device: torch.device, protocol: Protocol, size: tuple[int, int]) -> list[Found]:
    """The crops of one batch."""
    from jobs import triton_window as kernel

    samples = [_sample(i, protocol, size) for i in range(protocol.batch_size)]
    unresized = [
        Unresized(w, *(p[:, slice(*w.columns.needed)] for p in read)) for w, *read in samples
    ]
    batch = UnresizedBatch.of(unresized, protocol.crop, range(len(samples)))
    if device.type == "cuda":
        batch = batch.pin_memory()
    ours, theirs = partial(batch.to, device), partial(_on_processor, samples, protocol, device)
    reference = theirs()
    assert _equal(ours(), reference)
    more, limit = {}, ""
    if device.type == "cuda":
        more = {
            f"{tile[0]} x {tile[1]} bytes, {warps} warps: kernels, µs": variant(
                kernel, warps, {"TILE": tile}, ours, partial(_equal, reference), "resize_rows"
            )
            for tile in TILES
            for warps in WARPS
        }
        moved, rate = batch.pixels.numel() + 4 * batch.tables.numel(), transfer_bandwidth()
        limit = f"{moved / 1e6:.1f} MB over to it at {rate / 1e9:.1f} GB/s: "
        limit += time_text(moved / rate)
    return [
        *compare(
            f"crops of {len(samples)} pictures of {size[1]} x {size[0]}, on a GPU",
            waited(ours, device),
            {"on the processor, one thread": (waited(theirs, device), 0.0)},
            limit=limit, more=more,
        ),
    ]  # fmt: skip


def _sample(i: int, protocol: Protocol, size: tuple[int, int]) -> Sample:
    """A random view of a picture of noise, and the rows that it shows of picture and label map."""
    noise = np.random.default_rng(i)
    window = draw_view(*size, protocol, Draw(0, 0, i)).window(*size)
    rows = slice(*window.source_rows)
    picture = noise.integers(256, size=(*size, 3), dtype=np.uint8)
    return window, picture[rows], noise.integers(21, size=size, dtype=np.uint8)[rows]


def _on_processor(samples: Sequence[Sample], protocol: Protocol, device: torch.device) -> Batch:
    """The same batch, resized as loaders do by default."""
    images = np.zeros((len(samples), 3, *protocol.crop), np.uint8)
    target = np.full((len(samples), *protocol.crop), counting.VOID, np.uint8)
    for (window, picture, labels), image, label in zip(samples, images, target, strict=True):
        rows, columns = window.shape
        image[:, :rows, :columns] = window.of_image(picture)
        label[:rows, :columns] = window.of_label(labels)
    made = Batch(torch.from_numpy(images), torch.from_numpy(target), range(len(samples)))
    return made.to(device)


def _equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.target, other.target)


def variant(
    kernel: ModuleType,
    warps: int,
    size: Mapping[str, Any],
    work: Callable[[], Any],
    is_right: Callable[[Any], bool],
    name: str,
) -> float | str:
    """Microseconds that the kernel `name` takes in `work` with programs of another size and number
    of warps; or why there is no such number: others are still to be measured."""
    options = {**kernel.OPTIONS, "num_warps": warps}
    with mock.patch.multiple(kernel, OPTIONS=options, **size):
        try:
            if not is_right(work()):
                return "differs from its reference"
            return round(kernel_seconds(work, {name}) * 1e6, 2)
        except Exception as error:  # Triton, its compiler and the profiler raise what they like
            return in_short(error)


def _memory_limit(moved: int, device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    rate = copy_bandwidth()
    return f"{moved / 1e6:.1f} MB to read at {rate / 1e9:.0f} GB/s: {time_text(moved / rate)}"
