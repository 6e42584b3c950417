"""Random resize, flip and crop of one sample, and the resize of evaluation. All on uint8."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.settings import VOID
from jobs.protocol import Protocol

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


def augment(image: Bytes, label: Bytes, protocol: Protocol, draw: Draw) -> tuple[Bytes, Bytes]:
    """One training sample of the crop's size: the short side resized to a random length from
    `protocol.resize`, a horizontal flip, a random crop. Where the crop reaches beyond the image,
    pixels are 0 and labels void.

    image: uint8 [H, W, 3]; label: uint8 [H, W]. Returns uint8 [h, w, 3] and [h, w].
    """
    smallest, largest = protocol.resize
    short_side = smallest + draw.below(largest - smallest + 1)
    image, label = resize_short_side(image, label, short_side)
    if draw.chance(protocol.flip):
        image, label = image[:, ::-1], label[:, ::-1]
    height, width = protocol.crop
    top = draw.below(max(label.shape[0] - height, 0) + 1)
    left = draw.below(max(label.shape[1] - width, 0) + 1)
    window = (slice(top, top + height), slice(left, left + width))
    return _pad(image[window], protocol.crop, 0), _pad(label[window], protocol.crop, VOID)


def resize_short_side(image: Bytes, label: Bytes, short_side: int) -> tuple[Bytes, Bytes]:
    """Both resized so that the shorter side has `short_side` pixels: the image bilinear with
    antialiasing, the label by nearest neighbour. 0 leaves the size as it is."""
    height, width = label.shape
    if short_side in (0, min(height, width)):
        return image, label
    scale = short_side / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))  # PIL: width first
    return (
        np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)),
        np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST)),
    )


def _pad(pixels: Bytes, size: tuple[int, int], value: int) -> Bytes:
    padded = np.full((*size, *pixels.shape[2:]), value, dtype=np.uint8)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    return padded
