"""Make training batches and evaluation images from shards.

For a given data set and protocol, the global batch of step i depends only on (seed, i). Neither the
step at which training started nor the numbers of loader processes and ranks change it. Images are
resized, flipped and cropped as uint8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_prep.settings import VOID
from data_prep.shards.reader import Bytes, SplitReader
from jobs.kernels.resample import Span, Window
from jobs.spec.protocol import Protocol

# Reserved sample number whose random numbers give the order of an epoch.
_ORDER = 2**32 - 1


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch.

    Attributes:
        images: uint8 [b, 3, h, w].
        target: uint8 [b, h, w].
        positions: places of its images in the global batch.
    """

    images: Tensor
    target: Tensor
    positions: range

    def pin_memory(self) -> Batch:
        """Return a copy in pinned memory, which a GPU reads by itself."""
        return replace(self, images=self.images.pin_memory(), target=self.target.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to `device`, asynchronously if it lies in pinned memory."""
        images, target = (t.to(device, non_blocking=True) for t in (self.images, self.target))
        return replace(self, images=images, target=target)


class TrainingBatches:
    """The training batches of one rank, indexed by step."""

    def __init__(
        self, reader: SplitReader, protocol: Protocol, seed: int, rank: int, world_size: int
    ) -> None:
        self.steps_per_epoch = protocol.steps_per_epoch(len(reader))
        self.positions = share(protocol.batch_size, rank, world_size)
        self._reader = reader
        self._protocol = protocol
        self._seed = seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of images and target of a `Batch`."""
        height, width = self._protocol.crop
        return 4 * len(self.positions) * height * width

    def __getitem__(self, step: int) -> Batch:
        batch = self.view(step, np.empty(self.num_bytes, np.uint8))
        self.write(step, batch)
        return batch

    def view(self, _step: int, memory: Bytes) -> Batch:
        """Return a batch whose images and target are the `num_bytes` of `memory`."""
        number, crop = len(self.positions), self._protocol.crop
        images, target = torch.from_numpy(memory).split([self.num_bytes * n // 4 for n in (3, 1)])
        return Batch(images.view(number, 3, *crop), target.view(number, *crop), self.positions)

    def write(self, step: int, into: Batch) -> None:
        """Overwrite `into` with the batch of a step."""
        pairs = zip(into.images.numpy(), into.target.numpy(), strict=True)
        for arrays, (epoch, sample) in zip(pairs, self._samples(step), strict=True):
            draw = Draw(self._seed, epoch, sample)
            augmented_sample(self._reader, sample, self._protocol, draw, arrays)

    def _samples(self, step: int) -> list[tuple[int, int]]:
        """Return (epoch, sample number) of each sample of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            drawn = Draw(self._seed, epoch, _ORDER).permutation(len(self._reader))
            self._epoch, self._order = epoch, drawn
        first = within * self._protocol.batch_size
        return [(epoch, int(self._order[first + position])) for position in self.positions]


class EvaluationImages:
    """The validation images, indexed by number: image uint8 [3, h, w], label map uint8 [h, w]."""

    def __init__(self, reader: SplitReader, protocol: Protocol) -> None:
        self._reader = reader
        self._protocol = protocol

    @cached_property
    def num_bytes(self) -> int:
        """Return the bytes of the largest image with its label map."""
        sizes = {self._reader.size(i) for i in range(len(self._reader))}
        return max((4 * h * w for h, w in (self._resized(*size) for size in sizes)), default=0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.view(index, np.empty(self.num_bytes, np.uint8))
        self.write(index, pair)
        return pair

    def view(self, index: int, memory: Bytes) -> tuple[Tensor, Tensor]:
        """Return an image and a label map of the size of `index` as views of `memory`."""
        height, width = self._resized(*self._reader.size(index))
        pixels = height * width
        image, label = torch.from_numpy(memory[: 4 * pixels]).split([3 * pixels, pixels])
        return image.view(3, height, width), label.view(height, width)

    def write(self, index: int, into: tuple[Tensor, Tensor]) -> None:
        """Overwrite `into` with the image and label map of `index`."""
        image, label = (tensor.numpy() for tensor in into)
        read = self._reader.image(index), self._reader.label(index)
        resized_for_evaluation(*read, self._protocol, (image, label))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        return resized_size(height, width, self._protocol.eval_size, self._protocol.long_side)


def share(batch_size: int, rank: int, world_size: int) -> range:
    """Return the places of `rank` in the global batch, contiguous; shares differ by at most one."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


class Draw:
    """The random numbers of one sample, a function of (seed, epoch, sample).

    They are raw bits of the counter-based generator Philox, which no numpy release changes.
    """

    def __init__(self, seed: int, epoch: int, sample: int) -> None:
        key = [seed % 2**64, epoch << 32 | sample]
        self._bits = np.random.Philox(key=np.array(key, dtype=np.uint64))

    def below(self, bound: int) -> int:
        """Return a uniform integer in [0, bound)."""
        return int(self._bits.random_raw()) * bound >> 64

    def chance(self, probability: float) -> bool:
        """Return True with this probability, in [0, 1]."""
        return int(self._bits.random_raw()) < probability * 2**64

    def permutation(self, length: int) -> NDArray[np.int64]:
        """Return a random order of 0 .. length - 1, int64 [length]."""
        return np.argsort(self._bits.random_raw(length), kind="stable")


class View(NamedTuple):
    """The crop of a training sample: the image is resized to `size`, then flipped, then cropped.

    Attributes:
        size: (height, width) of the resized image, pixels.
        top: first row of the crop.
        left: first column of the crop.
        shape: (height, width) of the crop, pixels; at most `size`.
        mirrored: True if the image is flipped horizontally before the crop.
    """

    size: tuple[int, int]
    top: int
    left: int
    shape: tuple[int, int]
    mirrored: bool

    def window(self, height: int, width: int) -> Window:
        """Return the region of the resized image that the crop covers.

        The image has `height` x `width` pixels before the resize.
        """
        rows, columns = self.shape
        # the left of the mirrored image is the right of the image
        left = self.size[1] - self.left - columns if self.mirrored else self.left
        return Window(
            Span(height, self.size[0], self.top, self.top + rows),
            Span(width, self.size[1], left, left + columns, self.mirrored),
        )


def draw_view(height: int, width: int, protocol: Protocol, draw: Draw) -> View:
    """Draw a crop of an image of `height` x `width` pixels.

    The short side gets a random length from `protocol.resize`; flip and position are random.
    """
    smallest, largest = protocol.resize
    short_side = smallest + draw.below(largest - smallest + 1)
    size = resized_size(height, width, short_side, protocol.long_side)
    mirrored = draw.chance(protocol.flip)
    top, left = (
        draw.below(max(length - crop, 0) + 1)
        for length, crop in zip(size, protocol.crop, strict=True)
    )
    shape = (min(protocol.crop[0], size[0]), min(protocol.crop[1], size[1]))
    return View(size, top, left, shape, mirrored)


def augmented_sample(
    reader: SplitReader,
    i: int,
    protocol: Protocol,
    draw: Draw,
    into: tuple[Bytes, Bytes] | None = None,
) -> tuple[Bytes, Bytes]:
    """Return sample `i`, augmented. Read and resize only the rows that its crop needs.

    The result equals that of `augment` with Pillow 13 byte for byte.

    Args:
        draw: the random numbers of the sample.
        into: contiguous arrays to overwrite and return; None makes new ones.

    Returns:
        Image uint8 [3, h, w] and label map uint8 [h, w] of the size `protocol.crop`.
    """
    height, width = reader.size(i)
    view = draw_view(height, width, protocol, draw)
    window = view.window(height, width)
    image, label = into or (np.empty((3, *protocol.crop), np.uint8), np.empty(protocol.crop, "u1"))
    pixels, labels = reader.image(i, window.source_rows), reader.label(i, window.source_rows)
    if view.shape == protocol.crop:
        return window.of_image(pixels, image), window.of_label(labels, label)
    rows, columns = view.shape
    image[:], label[:] = 0, VOID
    image[:, :rows, :columns] = window.of_image(pixels)
    label[:rows, :columns] = window.of_label(labels)
    return image, label


def augment(image: Bytes, label: Bytes, protocol: Protocol, draw: Draw) -> tuple[Bytes, Bytes]:
    """Return a training sample of the size of the crop: the reference for `augmented_sample`.

    It uses Pillow. Beyond the image, pixels are 0 and labels void.

    Args:
        image: uint8 [H, W, 3].
        label: uint8 [H, W].

    Returns:
        Image uint8 [h, w, 3] and label map uint8 [h, w].
    """
    height, width = label.shape
    view = draw_view(height, width, protocol, draw)
    image, label = _resize(image, label, view.size)
    if view.mirrored:
        image, label = image[:, ::-1], label[:, ::-1]
    window = tuple(
        slice(first, first + length)
        for first, length in zip((view.top, view.left), view.shape, strict=True)
    )
    return _pad(image[window], protocol.crop, 0), _pad(label[window], protocol.crop, VOID)


def resized_for_evaluation(
    image: Bytes, label: Bytes, protocol: Protocol, into: tuple[Bytes, Bytes] | None = None
) -> tuple[Bytes, Bytes]:
    """Return a validation image and its label map, resized: the bytes of `resize_short_side`.

    Args:
        image: uint8 [H, W, 3].
        label: uint8 [H, W].
        into: contiguous arrays to overwrite and return; None makes new ones.

    Returns:
        Image uint8 [3, h, w], channels first, and label map uint8 [h, w].
    """
    height, width = label.shape
    rows, columns = resized_size(height, width, protocol.eval_size, protocol.long_side)
    seen, classes = into or (np.empty((3, rows, columns), "u1"), np.empty((rows, columns), "u1"))
    if (rows, columns) == label.shape:
        seen[:], classes[:] = image.transpose(2, 0, 1), label
        return seen, classes
    whole = Window(Span(height, rows, 0, rows), Span(width, columns, 0, columns))
    return whole.of_image(image, seen), whole.of_label(label, classes)


def resize_short_side(image: Bytes, label: Bytes, protocol: Protocol) -> tuple[Bytes, Bytes]:
    """Resize an image and its label map for validation: the reference for `resized_for_evaluation`.

    It uses Pillow: bilinear with antialiasing for the image, nearest neighbour for the label. The
    bytes are equal with Pillow 13. The shorter side gets `eval_size` pixels; 0 keeps the size.
    """
    height, width = label.shape
    return _resize(
        image, label, resized_size(height, width, protocol.eval_size, protocol.long_side)
    )


def resized_size(height: int, width: int, short_side: int, long_side: str) -> tuple[int, int]:
    """Return (height, width) of an image whose shorter side is resized to `short_side` pixels.

    Args:
        short_side: 0 keeps the size.
        long_side: "round" or "truncate", see `Protocol`.
    """
    short = min(height, width)
    if short_side in (0, short):
        return height, width
    if long_side == "truncate":
        return height * short_side // short, width * short_side // short
    scale = short_side / short
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resize(image: Bytes, label: Bytes, size: tuple[int, int]) -> tuple[Bytes, Bytes]:
    if size == label.shape:
        return image, label
    width_first = size[::-1]
    return (
        np.asarray(Image.fromarray(image).resize(width_first, Image.Resampling.BILINEAR)),
        np.asarray(Image.fromarray(label).resize(width_first, Image.Resampling.NEAREST)),
    )


def _pad(pixels: Bytes, size: tuple[int, int], value: int) -> Bytes:
    padded = np.full((*size, *pixels.shape[2:]), value, dtype=np.uint8)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    return padded
