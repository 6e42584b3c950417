"""Measure reading, augmenting and batching with two loader processes under the paper's protocol.

The protocol has a short side of 260 to 1040, flips, crops of 480, and batches of 12. The peers read
the same pictures from a folder of PNG or JPEG files. They use Pillow and the transforms of
torchvision's reference programs, as the published code does. Batches are uint8, channels first.

The peers decode and resize whole pictures. Ours reads and resizes only the part that the crop
shows, with the same bytes as Pillow. A second comparison measures this for single pictures.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import RandomCrop, functional

from benchmarks.measure import NotMeasured, Result, compare, copy_bandwidth
from benchmarks.pictures import PictureSet, on_all
from data_prep.settings import VOID
from hpc.distributed.allocator import keep_freed_memory
from jobs.data.batches import TrainingBatches
from jobs.data.loader import load_steps
from jobs.kernels.resample import Span, Window
from jobs.spec.protocol import Protocol

PROTOCOL = Protocol(batch_size=12)  # the paper's, as are all defaults
WORKERS = 2
WHAT = "read, augment and batch, two workers"
PNG, JPEG = "PNG folder, Pillow", "JPEG folder, Pillow"
# by set: the target ratios to PNG and to JPEG; batches of a round; rounds
SETS = {"CamVid": (6.0, 4.0, 48, 5), "2048 x 1024": (10.0, 4.0, 12, 3)}
# (height, width) of a picture, its size after resizing, and the side of the crop from its middle
WINDOWS = (
    ((360, 480), (400, 533), 320),
    ((360, 480), (260, 347), 260),
    ((1024, 2048), (700, 1400), 480),
    ((1024, 2048), (1500, 3000), 480),
)


def measure() -> list[Result]:
    """Compare seconds per batch, with the start of the loaders, and seconds per picture.

    All use the allocator settings of a job's loaders.
    """
    keep_freed_memory()
    found = on_all(_compared, _no_camvid)
    return found + [one for case in WINDOWS for one in _window(*case)]


class Folder(Dataset[tuple[Tensor, Tensor]]):
    """Samples by Pillow and torchvision's reference transforms: uint8 [3, h, w] and [h, w]."""

    def __init__(self, images: list[Path], labels: list[Path]) -> None:
        self._pairs = list(zip(images, labels, strict=True))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, label = (Image.open(file) for file in self._pairs[i])
        image, label = _randomly_cropped(*_randomly_resized(image.convert("RGB"), label))
        return functional.pil_to_tensor(image), torch.from_numpy(np.array(label))


def _randomly_resized(image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
    smallest, largest = PROTOCOL.resize
    side = int(torch.randint(smallest, largest + 1, ()))
    image = functional.resize(image, [side], antialias=True)
    label = functional.resize(label, [side], functional.InterpolationMode.NEAREST)
    if torch.rand(()) < PROTOCOL.flip:
        return functional.hflip(image), functional.hflip(label)
    return image, label


def _randomly_cropped(image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
    rows, columns = PROTOCOL.crop
    beyond = [0, 0, max(columns - image.width, 0), max(rows - image.height, 0)]
    if any(beyond):
        image, label = functional.pad(image, beyond), functional.pad(label, beyond, fill=VOID)
    place = RandomCrop.get_params(image, (rows, columns))
    return functional.crop(image, *place), functional.crop(label, *place)


def _compared(pictures: PictureSet) -> list[Result]:
    to_png, to_jpeg, steps, rounds = SETS[pictures.name]
    labels = pictures.files("labels")
    peers = {
        PNG: (Folder(pictures.files("png"), labels), to_png),
        JPEG: (Folder(pictures.files("jpeg"), labels), to_jpeg),
    }
    batches = TrainingBatches(pictures.reader, PROTOCOL, seed=0, rank=0, world_size=1)
    return [
        *compare(
            f"{WHAT}, {pictures.name}",
            lambda: _drain(load_steps(batches, 0, steps, WORKERS), steps),
            {
                name: (partial(_load, folder, steps), target)
                for name, (folder, target) in peers.items()
            },
            rounds=rounds,
            limit=_limit(),
            units=steps,
            more={"PNG bytes a pixel": round(pictures.png_bytes_per_pixel, 2)},
        )
    ]


def _limit() -> str:
    """Return the time to copy a finished batch."""
    size = 4 * PROTOCOL.batch_size * PROTOCOL.crop[0] * PROTOCOL.crop[1]  # images and label maps
    rate = copy_bandwidth() / 2
    return f"copying {size / 1e6:.1f} MB at {rate / 1e9:.1f} GB/s: {size / rate * 1e3:.3g} ms"


def _no_camvid() -> list[Result]:
    return [NotMeasured(f"{WHAT}, CamVid", peer, "CamVid is not here") for peer in (PNG, JPEG)]


def _load(folder: Folder, steps: int) -> None:
    samples = RandomSampler(folder, replacement=True, num_samples=steps * PROTOCOL.batch_size)
    _drain(DataLoader(folder, PROTOCOL.batch_size, sampler=samples, num_workers=WORKERS), steps)


def _drain(batches: Iterable[object], steps: int) -> None:
    assert sum(1 for _ in batches) == steps


def _window(size: tuple[int, int], resized: tuple[int, int], side: int) -> list[Result]:
    """Compare the crop from the middle of one resized picture, from its pixels in memory."""
    image = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    whole, width_first = Image.fromarray(image), resized[::-1]
    top, left = ((length - side) // 2 for length in resized)

    def ours() -> NDArray[np.uint8]:
        rows = Span(size[0], resized[0], top, top + side)
        window = Window(rows, Span(size[1], resized[1], left, left + side))
        return window.of_image(image[slice(*window.source_rows)])

    def pillows() -> NDArray[np.uint8]:
        resample = Image.Resampling.BILINEAR
        box = left, top, left + side, top + side
        return np.asarray(whole.resize(width_first, resample).crop(box)).transpose(2, 0, 1)

    assert np.array_equal(ours(), pillows())
    what = f"one image, crop only: {_shown(size)} to {_shown(resized)}, crop {side}"
    return [*compare(what, ours, {"Pillow: resize the image, then crop": (pillows, 0.0)})]


def _shown(size: tuple[int, int]) -> str:
    return " x ".join(map(str, size))
