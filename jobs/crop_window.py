"""Resizes only the window of an image that survives a crop, to the very bytes that Pillow gives
when it resizes the whole image, which is then cropped.

Pillow (`Resample.c`) resizes one axis, rounds to uint8, and then the other, with integer weights of
22 fractional bits. Its `resize(box=...)` is not the same: it places the weights anew. Here the
weights are those of the whole image, but only pixels of the window are computed, from only the rows
of the image that they depend on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.compiled import compiled, types

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]

_BITS = 22  # PRECISION_BITS of Resample.c: 32 less 8 of a value less 2 of overshoot
_HALF = 1 << (_BITS - 1)
_WHITE = np.int32(255)


class Span(NamedTuple):
    """The part [start, stop) of one axis of an image that was resized from `length` to `resized`
    pixels; seen from its end if it is `mirrored`."""

    length: int
    resized: int
    start: int
    stop: int
    mirrored: bool = False


class Window:
    """What a crop shows of a resized image: two spans of its axes."""

    def __init__(self, rows: Span, columns: Span) -> None:
        self.shape = (rows.stop - rows.start, columns.stop - columns.start)
        self._down, self._across = _bilinear(*rows), _bilinear(*columns)
        self._row, self._column = _nearest(*rows), _nearest(*columns)
        lost = rows.length - rows.resized, columns.length - columns.resized
        self._rows_first = lost[0] > max(0, 2 * lost[1])  # found in Pillow 13, which names no rule

    @property
    def source_rows(self) -> tuple[int, int]:
        """The rows [first, stop) of the image, as it was before the resize, that are needed."""
        first, weights = self._down
        return (
            min(int(first.min()), int(self._row.min())),
            max(int(first.max()) + weights.shape[1], int(self._row.max()) + 1),
        )

    def of_image(self, image: Bytes) -> Bytes:
        """The window of the image, resized bilinearly with antialiasing, uint8 [3, h, w].

        image: its `source_rows`, contiguous uint8 [rows, W, 3].
        """
        down = self._down[0] - self.source_rows[0], self._down[1]
        num_rows, num_columns = self.shape
        window = np.empty((3, num_rows, num_columns), np.uint8)
        if self._rows_first:
            between = np.empty((num_rows, *image.shape[1:]), np.uint8)
            flat = image.reshape(1, len(image), -1)
            _resize_rows(flat, *down, between.reshape(1, num_rows, -1))
            _resize_columns(between, *self._across, window)
        else:
            planes = np.empty((3, len(image), num_columns), np.uint8)
            _resize_columns(image, *self._across, planes)
            _resize_rows(planes, *down, window)
        return window

    def of_label(self, label: Bytes) -> Bytes:
        """The window of the label map, resized to the nearest neighbour, uint8 [h, w].

        label: its `source_rows`, uint8 [rows, W].
        """
        return label[(self._row - self.source_rows[0])[:, None], self._column]


_READ = types.Array(types.uint8, 3, "C", readonly=True)  # one that may be written to fits too
_WRITTEN, _FIRST, _WEIGHTS = types.uint8[:, :, ::1], types.int32[::1], types.int32[:, ::1]
_SPAN = (types.int64, types.int64, types.int64, types.int64, types.boolean)


@compiled(types.Tuple((_FIRST, _WEIGHTS))(*_SPAN))
def _bilinear(
    length: int, resized: int, start: int, stop: int, mirrored: bool
) -> tuple[Ints, Ints]:
    """Of each pixel of a span: the first pixel it depends on, and the weights of that one and
    those that follow."""
    count, scale = stop - start, length / resized
    support = max(scale, 1.0)
    first, num_taps = np.empty(count, np.int32), np.empty(count, np.int32)
    for i in range(count):
        centre = ((stop - 1 - i if mirrored else start + i) + 0.5) * scale
        first[i] = max(int(centre - support + 0.5), 0)
        num_taps[i] = min(int(centre + support + 0.5), length) - first[i]
    most = num_taps.max() if resized != length else 1
    weights, real = np.zeros((count, most), np.int32), np.empty(most)
    for i in range(count):
        place = stop - 1 - i if mirrored else start + i
        if resized == length:  # such an axis stays as it is
            first[i], weights[i, 0] = place, 1 << _BITS
            continue
        centre, total = (place + 0.5) * scale, 0.0
        for k in range(num_taps[i]):
            real[k] = max(0.0, 1.0 - abs((k + first[i] - centre + 0.5) * (1.0 / support)))
            total += real[k]
        shift = max(0, first[i] + most - length)  # so that all taps lie in the image
        first[i] -= shift
        for k in range(num_taps[i]):
            weights[i, shift + k] = int(0.5 + real[k] / total * (1 << _BITS))
    return first, weights


@compiled(_FIRST(*_SPAN))
def _nearest(length: int, resized: int, start: int, stop: int, mirrored: bool) -> Ints:
    """The pixel that each pixel of a span shows."""
    scale = length / resized
    nearest = np.empty(stop - start, np.int32)
    place = 0.5 * scale
    for i in range(stop):  # added up step by step, whose rounding a product would not have
        if i >= start:
            nearest[stop - 1 - i if mirrored else i - start] = int(place)
        place += scale
    return nearest


@compiled(types.void(_READ, _FIRST, _WEIGHTS, _WRITTEN))
def _resize_columns(image: Bytes, first: Ints, weights: Ints, planes: Bytes) -> None:
    num_columns, num_taps = weights.shape
    for y in range(image.shape[0]):
        for x in range(num_columns):
            red = green = blue = np.int32(_HALF)
            for k in range(num_taps):
                weight, at = weights[x, k], first[x] + k
                red += weight * np.int32(image[y, at, 0])
                green += weight * np.int32(image[y, at, 1])
                blue += weight * np.int32(image[y, at, 2])
            planes[0, y, x] = min(red >> _BITS, _WHITE)
            planes[1, y, x] = min(green >> _BITS, _WHITE)
            planes[2, y, x] = min(blue >> _BITS, _WHITE)


@compiled(types.void(_READ, _FIRST, _WEIGHTS, _WRITTEN))
def _resize_rows(planes: Bytes, first: Ints, weights: Ints, window: Bytes) -> None:
    num_rows, num_taps = weights.shape
    width = planes.shape[2]
    total = np.empty(width, np.int32)
    for plane in range(planes.shape[0]):
        for y in range(num_rows):
            total[:] = _HALF
            for k in range(num_taps):
                weight, row = weights[y, k], planes[plane, first[y] + k]
                for x in range(width):
                    total[x] += weight * np.int32(row[x])
            for x in range(width):
                window[plane, y, x] = min(total[x] >> _BITS, _WHITE)
