"""Evaluate every cell of a bundle on the validation shards, one image for each forward pass.

Rank i mod world_size evaluates image i. No image is padded or repeated. A GPU works on the next
image while the CPU counts the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from data_prep.settings import VOID
from data_prep.shards.reader import SplitReader
from hpc.distributed.launcher import cpus_of_rank
from hpc.distributed.process_group import Group
from jobs.data.batches import EvaluationImages
from jobs.data.loader import load_images
from jobs.kernels.fused_counts import count_upsampled
from jobs.metrics.counts import Counts
from jobs.metrics.reference import count_image
from jobs.models.build import normalise, upsample
from jobs.spec.protocol import Protocol

Forward = Callable[[Tensor], list[Tensor]]
Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def evaluate(
    forward: Forward,
    num_cells: int,
    reader: SplitReader,
    num_classes: int,
    protocol: Protocol,
    group: Group,
    stop: Callable[[], bool],
    fetch: Callable[[Iterator[Pair]], Pair | None] = lambda images: next(images, None),
) -> list[Counts | None] | None:
    """Return the counts of each cell over all images and ranks, or None on a stop.

    The counts of a cell are None if its logits are not all finite.

    Args:
        forward: normalised images [1, 3, H, W] -> logits [1, C, h, w] of each cell, at any stride.
        num_cells: number of cells.
        reader: the validation split.
        num_classes: C.
        protocol: sizes, bins and `counting`.
        group: the ranks, which must all call this together.
        stop: called by all ranks together after each fetch; returns the same on all of them.
        fetch: returns the next image, or None at the end.
    """
    if num_cells == 0:
        return []
    counts = [Counts.zeros(num_classes, protocol.bins) for _ in range(num_cells)]
    not_finite = [False] * num_cells

    def add(passed: _Passed) -> None:
        logits, finite, target = passed.wait()
        for i, output in enumerate(logits):
            not_finite[i] |= not finite[i]
            if not not_finite[i]:
                counts[i] += count(output[0], target, protocol, threads)

    threads = counting_threads(protocol, group)
    mine = range(group.rank, len(reader), group.world_size)
    loaded = load_images(EvaluationImages(reader, protocol), mine, protocol.workers)
    last: _Passed | None = None
    # close on errors too: a traceback would keep the loader processes alive
    with closing(loaded) as images:
        for _ in range(0, len(reader), group.world_size):
            pair = fetch(images)
            if stop():
                return None
            if pair is None:  # in the last round some ranks may have no image
                continue
            image, target = pair
            logits = forward(normalise(image[None].to(group.device, non_blocking=True)))
            passed = _Passed(logits, target, to_host=protocol.counting == "fused")
            # counted on the CPU while a GPU works on this image; its target is valid until the
            # caller asks for the next image
            if last is not None:
                add(last)
            last = passed
        if last is not None:
            add(last)
    agreed = [bool(group.max(one)) for one in not_finite]
    return [None if b else _sum_over_ranks(c, group) for b, c in zip(agreed, counts, strict=True)]


class _Passed:
    """The logits of one image, whose forward pass may still run on a GPU.

    The copies to the host are queued at once, so that they precede the pass of the next image.
    """

    def __init__(self, logits: Sequence[Tensor], target: Tensor, to_host: bool) -> None:
        finite = torch.stack([torch.isfinite(one).all() for one in logits])
        on_gpu = finite.is_cuda
        self._logits = [_queue_copy(one) for one in logits] if to_host and on_gpu else logits
        self._finite = _queue_copy(finite) if on_gpu else finite
        self._target = target
        # blocking, since by default the wait for an event keeps a core busy
        self._copied = torch.cuda.Event(blocking=True) if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> tuple[Sequence[Tensor], list[bool], Tensor]:
        """Return logits, whether each is finite, and target, once the copies have ended."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._logits, self._finite.tolist(), self._target


def _queue_copy(tensor: Tensor) -> Tensor:
    """Return a page-locked copy on the host; valid after an event recorded now."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def counting_threads(protocol: Protocol, group: Group) -> int:
    """Return the number of threads that count; it changes no count.

    Beside a GPU these are all CPUs of the rank. Without one they are `threads` of the protocol,
    since other jobs may use the other CPUs.
    """
    if group.device.type == "cpu":
        return protocol.threads
    return max(protocol.threads, cpus_of_rank(group.env))


def count(logits: Tensor, target: Tensor, protocol: Protocol, threads: int) -> Counts:
    """Return the counts of one image, by the protocol's `counting`.

    Args:
        logits: [C, h, w] at any stride.
        target: uint8 [H, W].
        threads: number of threads to count with.

    Raises:
        ValueError: the logits or labels cannot be counted.
    """
    if protocol.counting == "fused":
        return count_upsampled(logits, target, protocol.bins, threads)
    scores = upsample(logits[None].float(), (target.shape[0], target.shape[1]))[0]
    return count_image(scores, target.to(logits.device), protocol.bins, VOID)


def _sum_over_ranks(counts: Counts, group: Group) -> Counts:
    arrays = counts.as_arrays()
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays.values()]))
    summed = group.sum(flat).numpy()
    parts = np.split(summed, np.cumsum([array.size for array in arrays.values()])[:-1])
    shaped = zip(arrays.items(), parts, strict=True)
    return Counts.from_arrays({name: part.reshape(array.shape) for (name, array), part in shaped})


def stack(counts: Sequence[Counts]) -> dict[str, np.ndarray]:
    """Stack the arrays of several cells along a new first axis, as a counts file has them."""
    arrays = [c.as_arrays() for c in counts]
    return {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
