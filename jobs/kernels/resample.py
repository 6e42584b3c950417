"""Resize only the window of an image that a crop shows, with the bytes of Pillow 13.

The result equals that of Pillow 13 for the whole image, cropped; older releases may differ by
rounding. Pillow (`Resample.c`) resizes one
axis, rounds to uint8, and then resizes the other, with integer weights of 22 fractional bits. Its
`resize(box=...)` differs, because it computes other weights. Here the weights are those of the
whole image, but only pixels of the window are computed, from the rows that they depend on.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from jobs.kernels.numba_compile import compiled, types

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]

_BITS = 22  # PRECISION_BITS of Resample.c: 32 - 8 of a value - 2 of overshoot


class Span(NamedTuple):
    """The pixels [start, stop) of an axis of a resized image: `resized` pixels made from `length`.

    If `mirrored`, the window shows them in reverse order.
    """

    length: int
    resized: int
    start: int
    stop: int
    mirrored: bool = False


class Axis(NamedTuple):
    """The source pixels of the n pixels along an axis of a window.

    Attributes:
        first: the first source pixel that each pixel depends on, int32 [n].
        weights: weights of this source pixel and the next ones, int32 [n, taps].
        nearest: the nearest source pixel, int32 [n].
    """

    first: Ints
    weights: Ints
    nearest: Ints

    @classmethod
    def of(cls, span: Span) -> Axis:
        """Return the axis of a window that shows `span`."""
        first, weights = _bilinear(*span)
        return cls(first, weights, _nearest(*span))

    @property
    def source(self) -> tuple[int, int]:
        """Return the range [first, stop) of source pixels that its pixels depend on."""
        return (
            min(int(self.first.min()), int(self.nearest.min())),
            max(int(self.first.max()) + self.weights.shape[1], int(self.nearest.max()) + 1),
        )

    def counted_from(self, start: int) -> Axis:
        """Return the axis for a source that begins at the source pixel `start`."""
        return Axis(self.first - np.int32(start), self.weights, self.nearest - np.int32(start))


class Window:
    """The part of a resized image that a crop shows: the spans of its two axes."""

    def __init__(self, rows: Span, columns: Span) -> None:
        self.shape = (rows.stop - rows.start, columns.stop - columns.start)
        self.rows, self.columns = Axis.of(rows), Axis.of(columns)
        lost = rows.length - rows.resized, columns.length - columns.resized
        self.rows_first = lost[0] > max(0, 2 * lost[1])  # as Pillow 13 does, without documenting it

    @cached_property
    def source_rows(self) -> tuple[int, int]:
        """Return the range [first, stop) of rows of the image before the resize that it needs."""
        return self.rows.source

    def of_image(self, image: Bytes, window: Bytes | None = None) -> Bytes:
        """Return the window of the image, resized bilinearly with antialiasing, uint8 [3, h, w].

        Args:
            image: the `source_rows` of the image, contiguous uint8 [rows, W, 3].
            window: contiguous array to overwrite and return; None makes a new one.
        """
        down, across = self.rows.counted_from(self.source_rows[0])[:2], self.columns[:2]
        num_rows, num_columns = self.shape
        if window is None:
            window = np.empty((3, num_rows, num_columns), np.uint8)
        lines = image.reshape(len(image), -1)
        if self.rows_first:
            between = np.empty((1, num_rows, lines.shape[1]), np.uint8)
            _resize_rows(lines[None], *down, between)
            _resize_columns(between[0], *across, window)
        else:
            planes = np.empty((3, len(image), num_columns), np.uint8)
            _resize_columns(lines, *across, planes)
            _resize_rows(planes, *down, window)
        return window

    def of_label(self, label: Bytes, window: Bytes | None = None) -> Bytes:
        """Return the window of the label map, resized by nearest neighbour, uint8 [h, w].

        Args:
            label: the `source_rows` of the label map, contiguous uint8 [rows, W].
            window: contiguous array to overwrite and return; None makes a new one.
        """
        if window is None:
            window = np.empty(self.shape, np.uint8)
        rows = self.rows.counted_from(self.source_rows[0])
        _pick(label, rows.nearest, self.columns.nearest, window)
        return window


_READ = types.Array(types.uint8, 2, "C", readonly=True)  # accepts writable arrays too
_PLANES = types.Array(types.uint8, 3, "C", readonly=True)
_WRITTEN, _FIRST, _WEIGHTS = types.uint8[:, :, ::1], types.int32[::1], types.int32[:, ::1]
_SPAN = (types.int64, types.int64, types.int64, types.int64, types.boolean)


@compiled(types.Tuple((_FIRST, _WEIGHTS))(*_SPAN))
def _bilinear(
    length: int, resized: int, start: int, stop: int, mirrored: bool
) -> tuple[Ints, Ints]:
    """Return `first` and `weights` of an `Axis`."""
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
        if resized == length:  # this axis is not resized
            first[i], weights[i, 0] = place, 1 << _BITS
            continue
        centre, total = (place + 0.5) * scale, 0.0
        for k in range(num_taps[i]):
            real[k] = max(0.0, 1.0 - abs((k + first[i] - centre + 0.5) * (1.0 / support)))
            total += real[k]
        shift = max(0, first[i] + most - length)  # keeps all taps inside the image
        first[i] -= shift
        for k in range(num_taps[i]):
            weights[i, shift + k] = int(0.5 + real[k] / total * (1 << _BITS))
    return first, weights


@compiled(_FIRST(*_SPAN))
def _nearest(length: int, resized: int, start: int, stop: int, mirrored: bool) -> Ints:
    """Return `nearest` of an `Axis`."""
    scale = length / resized
    nearest = np.empty(stop - start, np.int32)
    place = 0.5 * scale
    for i in range(stop):  # as Pillow: the product i * scale would round otherwise
        if i >= start:
            nearest[stop - 1 - i if mirrored else i - start] = int(place)
        place += scale
    return nearest


@compiled(types.void(_READ, _FIRST, _FIRST, types.uint8[:, ::1]))
def _pick(label: Bytes, rows: Ints, columns: Ints, window: Bytes) -> None:
    column = columns.astype(np.uint32)
    for y in range(rows.size):
        if y > 0 and rows[y] == rows[y - 1]:  # frequent if rows are enlarged
            window[y] = window[y - 1]
            continue
        line = label[rows[y]]
        for x in range(column.size):
            window[y, x] = line[column[x]]


# LLVM vectorises the functions below. `_pack` makes one integer of the three bytes of a pixel, so
# that a tap loads a pixel at once. All numbers are unsigned 32-bit integers: with signed ones numba
# checks for negative indices and computes in 64 bits.
_ROUNDED_UP, _SHIFT, _MOST = np.uint32(1 << (_BITS - 1)), np.uint32(_BITS), np.uint32(255)
_ONE, _TWO, _THREE, _BYTE, _TWO_BYTES = (np.uint32(number) for number in (1, 2, 3, 8, 16))


@njit
def _pack(row: Bytes, packed: Any) -> None:
    for x in range(np.uint64(packed.size)):
        red, green, blue = row[_THREE * x], row[_THREE * x + _ONE], row[_THREE * x + _TWO]
        packed[x] = np.uint32(red) | np.uint32(green) << _BYTE | np.uint32(blue) << _TWO_BYTES


@njit
def _add_colours(pixels: Any, weights: Any, reds: Any, greens: Any, blues: Any) -> None:
    for x in range(pixels.size):
        pixel, weight = pixels[x], weights[x]
        reds[x] += weight * (pixel & _MOST)
        greens[x] += weight * (pixel >> _BYTE & _MOST)
        blues[x] += weight * (pixel >> _TWO_BYTES)


@njit
def _add(line: Bytes, weight: np.uint32, sums: Any) -> None:
    for x in range(sums.size):
        sums[x] += weight * np.uint32(line[x])


@njit
def _blend(one: Bytes, other: Bytes, weights: Ints, values: Bytes) -> None:
    first, second = np.uint32(weights[0]), np.uint32(weights[1])
    for x in range(values.size):
        total = _ROUNDED_UP + first * np.uint32(one[x]) + second * np.uint32(other[x])
        values[x] = min(total >> _SHIFT, _MOST)


@njit
def _shift(sums: Any, values: Bytes) -> None:
    for x in range(sums.size):
        values[x] = min(sums[x] >> _SHIFT, _MOST)


@compiled(types.void(_READ, _FIRST, _WEIGHTS, _WRITTEN))
def _resize_columns(image: Bytes, first: Ints, weights: Ints, planes: Bytes) -> None:
    num_columns, num_taps = weights.shape
    begin, end = first.min(), first.max() + num_taps
    packed, start = np.empty(end - begin, np.uint32), (first - begin).astype(np.uint32)
    by_tap = weights.T.copy().astype(np.uint32)
    pixels, sums = np.empty(num_columns, np.uint32), np.empty((3, num_columns), np.uint32)
    for y in range(image.shape[0]):
        _pack(image[y, 3 * begin : 3 * end], packed)
        sums[:] = _ROUNDED_UP
        for k in range(num_taps):
            tap = packed[k:]
            for x in range(num_columns):
                pixels[x] = tap[start[x]]
            _add_colours(pixels, by_tap[k], sums[0], sums[1], sums[2])
        for plane in range(3):
            _shift(sums[plane], planes[plane, y])


@compiled(types.void(_PLANES, _FIRST, _WEIGHTS, _WRITTEN))
def _resize_rows(planes: Bytes, first: Ints, weights: Ints, window: Bytes) -> None:
    num_rows, num_taps = weights.shape
    sums = np.empty(planes.shape[2], np.uint32)
    for plane in range(planes.shape[0]):
        for y in range(num_rows):
            lines = planes[plane, first[y] : first[y] + num_taps]
            if num_taps == 2:  # always if rows are enlarged
                _blend(lines[0], lines[1], weights[y], window[plane, y])
                continue
            sums[:] = _ROUNDED_UP
            for k in range(num_taps):
                _add(lines[k], np.uint32(weights[y, k]), sums)
            _shift(sums, window[plane, y])
