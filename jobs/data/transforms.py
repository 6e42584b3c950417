"""Random resize, flip and crop of one sample, and the resize of evaluation. All on uint8."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.settings import VOID
from data_prep.shards.reader import SplitReader
from jobs.kernels.resample import Span, Window
from jobs.spec.protocol import Protocol

Bytes = NDArray[np.uint8]


class Draw:
    """Random numbers of one sample: a counter-based generator, so that they depend on its key
    and on nothing that was drawn before. Raw bits only, whose meaning no numpy release changes."""

    def __init__(self, seed: int, epoch: int, sample: int) -> None:
        key = [seed % 2**64, epoch << 32 | sample]
        self._bits = np.random.Philox(key=np.array(key, dtype=np.uint64))

    def below(self, bound: int) -> int:
        """Uniform integer in [0, bound)."""
        return int(self._bits.random_raw()) * bound >> 64

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return int(self._bits.random_raw()) < probability * 2**64

    def permutation(self, length: int) -> NDArray[np.int64]:
        """A random order of 0 .. length - 1."""
        return np.argsort(self._bits.random_raw(length), kind="stable")


class View(NamedTuple):
    """What a training sample shows of its image: the part from (`top`, `left`) of `shape` pixels of
    the image, once that was resized to `size` and, if `mirrored`, flipped."""

    size: tuple[int, int]
    top: int
    left: int
    shape: tuple[int, int]
    mirrored: bool

    def window(self, height: int, width: int) -> Window:
        """Its window of an image of `height` x `width`."""
        rows, columns = self.shape
        # what is on the left of the mirrored image is on the right of the image
        left = self.size[1] - self.left - columns if self.mirrored else self.left
        return Window(
            Span(height, self.size[0], self.top, self.top + rows),
            Span(width, self.size[1], left, left + columns, self.mirrored),
        )


def draw_view(height: int, width: int, protocol: Protocol, draw: Draw) -> View:
    """A random view of an image of `height` x `width`: the short side resized to a random length
    from `protocol.resize`, a horizontal flip, a random crop."""
    smallest, largest = protocol.resize
    short_side = smallest + draw.below(largest - smallest + 1)
    size = resized(height, width, short_side, protocol.long_side)
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
    """Sample `i` as `augment` makes it from its image and label map, but reading and resizing only
    what its view shows. Returns uint8 [3, h, w], channels first, and [h, w]: the contiguous arrays
    `into`, whatever they held, or new ones."""
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
    """One training sample of the crop's size: `draw_view`'s view of the image. Where the crop
    reaches beyond the image, pixels are 0 and labels void. The plain way, through Pillow, which
    `augmented_sample` must equal.

    image: uint8 [H, W, 3]; label: uint8 [H, W]. Returns uint8 [h, w, 3] and [h, w].
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


def evaluation_view(
    image: Bytes, label: Bytes, protocol: Protocol, into: tuple[Bytes, Bytes] | None = None
) -> tuple[Bytes, Bytes]:
    """Return what evaluation sees of an image uint8 [H, W, 3] and its label map [H, W]: both as
    `resize_short_side` makes them, the image channels first. They are the contiguous arrays `into`,
    whatever those held, or new ones."""
    height, width = label.shape
    rows, columns = resized(height, width, protocol.eval_size, protocol.long_side)
    seen, classes = into or (np.empty((3, rows, columns), "u1"), np.empty((rows, columns), "u1"))
    if (rows, columns) == label.shape:
        seen[:], classes[:] = image.transpose(2, 0, 1), label
        return seen, classes
    whole = Window(Span(height, rows, 0, rows), Span(width, columns, 0, columns))
    return whole.of_image(image, seen), whole.of_label(label, classes)


def resize_short_side(image: Bytes, label: Bytes, protocol: Protocol) -> tuple[Bytes, Bytes]:
    """Both resized so that the shorter side has `eval_size` pixels: the image bilinear with
    antialiasing, the label by nearest neighbour. 0 leaves the size as it is. The plain way, through
    Pillow, which `evaluation_view` must equal."""
    height, width = label.shape
    return _resize(image, label, resized(height, width, protocol.eval_size, protocol.long_side))


def resized(height: int, width: int, short_side: int, long_side: str) -> tuple[int, int]:
    """Return the size of an image whose shorter side becomes `short_side` pixels; 0 leaves it as it
    is. `long_side` is that of `Protocol`."""
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
