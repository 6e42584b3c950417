"""The compiled loops of `jobs.kernels.fused_counts`.

A loop over classes has an inner loop over the pixels of one row of a tile, which LLVM vectorises.
No flag lets the compiler reorder or merge operations on reals, and sums are of integers. So counts
have the same bits for any tiles, and with the vector registers of any CPU.

All functions stand in one file: numba compiles anew only if the file of the outermost one changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from data_prep.settings import VOID
from jobs.kernels.numba_compile import compiled, types

Reals = NDArray[np.float32]
Longs = NDArray[np.int64]
Bytes = NDArray[np.uint8]

MOST_ROWS, MOST_COLUMNS = 4096, 512  # of a tile; wider rows would leave the caches
# Each bin is split into 8 slots, by column modulo 8, because consecutive additions to one slot wait
# for each other. A slot holds count * 2^44 + sum: room for 2^19 - 1 pixels. A tile adds at most
# 2^18 to one slot.
SLOTS = 8
_COUNT_BIT = np.int64(44)
_COUNTED = np.int64(1 << 44)

_ZERO, _ONE = np.float32(0), np.float32(1)
_FIXED_POINT, _NLL_FIXED_POINT, _LARGEST_NLL = np.float32(2**24), 2.0**16, 2.0**16
_VOID = np.uint8(VOID)

_LEAST = np.float32(-87)  # exp(-87) is about 2^-126, and the sums count in units of 2^-24
_PER_LN2, _SHIFT = np.float32(1 / np.log(2)), np.float32(1.5 * 2**23)
_LN2_HIGH = np.float32(0.693359375)  # 9 bits: its products with exponents are exact
_LN2_LOW = np.float32(np.log(2) - 0.693359375)
# (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2: least squares, reweighted to a minimal maximum
_TERMS = (0.4999999403953552, 0.1666652113199234, 0.04166838899254799, 0.008368716575205326,
          0.001381459878757596)  # fmt: skip
_C0, _C1, _C2, _C3, _C4 = (np.float32(c) for c in _TERMS)
_EXPONENT, _EXPONENT64 = np.int32(23), np.int64(52)  # first bit of the exponent
_ROOT_BITS, _LN2 = np.sqrt(0.5).view(np.int64), np.log(2.0)


@njit
def exp_negative(x: Any) -> Any:
    """Return exp(x) of a float32 x <= 0, at most 1 ulp off if it is above 0.001; exp(0) is 1."""
    x = _LEAST if x < _LEAST else x
    shifted = x * _PER_LN2 + _SHIFT  # its last bits are the integer nearest to x / log(2)
    n = shifted - _SHIFT
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    q = (((r * _C4 + _C3) * r + _C2) * r + _C1) * r + _C0
    power = q * r * r + r + _ONE
    exponent = np.float32(shifted).view(np.int32) << _EXPONENT
    return np.int32(np.float32(power).view(np.int32) + exponent).view(np.float32)


@njit(error_model="numpy")
def log_of_sum(total: Any) -> Any:
    """Return log(total) of a real >= 1 as float64, to 10^-8."""
    bits = np.float64(total).view(np.int64)
    exponent = (bits - _ROOT_BITS) >> _EXPONENT64
    m = np.int64(bits - (exponent << _EXPONENT64)).view(np.float64)
    f = (m - 1.0) / (m + 1.0)  # log(m) = 2 atanh(f), |f| <= 0.172
    g = f * f
    return exponent * _LN2 + 2 * f * (1 + g * (1 / 3 + g * (1 / 5 + g * (1 / 7 + g / 9))))


@njit
def _widen(logits: Reals, row: int, columns: Reals, wide: Reals) -> None:
    """Interpolate one row of the logits to the columns of the tile: `wide` [C, W]."""
    last = np.uint32(logits.shape[2] - 1)
    for c in range(wide.shape[0]):
        line = logits[c, row]
        for x in range(wide.shape[1]):
            left = np.uint32(columns[x])
            far = columns[x] - np.float32(left)
            wide[c, x] = line[left] * (_ONE - far) + line[min(left + np.uint32(1), last)] * far


@njit
def _blend(
    above: Reals, below: Reals, far: Any, plane: Reals, highest: Reals, prediction: Any
) -> None:
    """Interpolate between two rows; find each pixel's highest logit and the first class with it."""
    near = _ONE - far
    highest[:] = -np.inf
    for c in range(plane.shape[0]):
        for x in range(plane.shape[1]):
            z = above[c, x] * near + below[c, x] * far
            plane[c, x] = z
            is_higher = z > highest[x]
            prediction[x] = np.int32(c) if is_higher else prediction[x]
            highest[x] = z if is_higher else highest[x]


@njit
def _exponentiate(plane: Reals, highest: Reals, total: Reals) -> None:
    """Replace logits by exp(logit - highest); sum these over classes."""
    total[:] = _ZERO
    for c in range(plane.shape[0]):
        for x in range(plane.shape[1]):
            e = exp_negative(plane[c, x] - highest[x])
            plane[c, x] = e
            total[x] += e


@njit
def add_scores(plane: Reals, scale: Reals, squares: Reals, packed: Longs) -> None:
    """Add the scores `plane` * `scale` to `packed` [C, N * SLOTS]; sum their squares."""
    width, bins = plane.shape[1], packed.shape[1] // SLOTS
    slot, added, most = np.empty(width, np.uint64), np.empty(width, np.int64), np.int32(bins - 1)
    squares[:] = _ZERO
    for c in range(plane.shape[0]):
        for x in range(width):
            score = plane[c, x] * scale[x]
            squares[x] += score * score
            k = np.int32(score * np.float32(bins))
            k = most if k > most else k
            slot[x] = np.uint32(k * np.int32(SLOTS) + (np.int32(x) & np.int32(SLOTS - 1)))
            added[x] = _COUNTED + np.int32(np.rint(score * _FIXED_POINT))
        line = packed[c]
        for x in range(width):
            line[slot[x]] += added[x]


@njit
def unpack(packed: Longs, class_bins: Longs) -> None:
    """Add counts and sums of `packed` to `class_bins` [C, N, (count, ., sum)]."""
    for c in range(packed.shape[0]):
        for at in range(packed.shape[1]):
            class_bins[c, at // SLOTS, 0] += packed[c, at] >> _COUNT_BIT
            class_bins[c, at // SLOTS, 2] += packed[c, at] & (_COUNTED - 1)


@njit
def _bin(score: Any, bins: int) -> Any:
    return min(int(score * np.float32(bins)), bins - 1)


@njit
def _fixed(real: Any, unit: Any) -> Any:
    return np.int64(np.rint(real * unit))


_LONGS, _LONGS2, _LONGS3 = types.int64[::1], types.int64[:, ::1], types.int64[:, :, ::1]
_REALS, _REALS3, _BYTES2 = types.float32[::1], types.float32[:, :, ::1], types.uint8[:, ::1]


@compiled(types.void(_REALS3, _BYTES2, _REALS, _REALS, _LONGS2, _LONGS3, _LONGS2, _LONGS))
def count_tile(
    logits: Reals, target: Bytes, rows: Reals, columns: Reals,
    confusion: Longs, class_bins: Longs, top1_bins: Longs, sums: Longs,
) -> None:  # fmt: skip
    """Add the counts of one tile of an image to those of `jobs.metrics.counts.Counts`.

    A void pixel is counted only as a score of 0 in the lowest bin of each class.

    Args:
        logits: float32 [C, h, w], finite.
        target: labels [H, W], below C or void; H <= MOST_ROWS, W <= MOST_COLUMNS.
        rows: where the tile's rows [H] lie among those of the logits, from 0 to h - 1.
        columns: where its columns [W] lie, from 0 to w - 1.
        confusion: [C, C].
        class_bins: [C, N, 3].
        top1_bins: [N, 3].
        sums: [2], Brier and nll.
    """
    (height, width), (classes, bins, _) = target.shape, class_bins.shape
    plane, wide = np.empty((classes, width), np.float32), np.empty((2, classes, width), np.float32)
    highest, behind = np.empty(width, np.float32), np.empty(width, np.float32)
    total, scale = np.empty(width, np.float32), np.empty(width, np.float32)
    squares, prediction = np.empty(width, np.float32), np.zeros(width, np.int32)
    packed, held = np.zeros((classes, bins * SLOTS), np.int64), np.array([-1, -1])
    for y in range(height):
        labels, above = target[y], int(rows[y])
        below = min(above + 1, logits.shape[1] - 1)
        for row in (above, below):  # neighbours, or the same
            if held[row % 2] != row:
                _widen(logits, row, columns, wide[row % 2])
                held[row % 2] = row
        far = rows[y] - np.float32(above)
        _blend(wide[above % 2], wide[below % 2], far, plane, highest, prediction)
        for x in range(width):
            behind[x] = highest[x] - plane[labels[x] if labels[x] != _VOID else 0, x]
        _exponentiate(plane, highest, total)
        for x in range(width):
            scale[x] = np.float32(labels[x] != _VOID) / total[x]
        add_scores(plane, scale, squares, packed)
        for x in range(width):
            label = labels[x]
            if label == _VOID:
                continue
            true, top = plane[label, x] * scale[x], scale[x]  # exp(0) is 1
            confusion[label, prediction[x]] += 1
            class_bins[label, _bin(true, bins), 1] += 1
            top1_bins[_bin(top, bins), 0] += 1
            top1_bins[_bin(top, bins), 1] += label == prediction[x]
            top1_bins[_bin(top, bins), 2] += _fixed(top, _FIXED_POINT)
            brier = np.float64(squares[x]) - 2 * np.float64(true) + 1
            nll = min(log_of_sum(total[x]) + np.float64(behind[x]), _LARGEST_NLL)
            sums[0] += _fixed(brier, _FIXED_POINT)
            sums[1] += _fixed(nll, _NLL_FIXED_POINT)
    unpack(packed, class_bins)
