"""The kernel of `jobs.fused_counts`. Planes are [C, W], a class after the other, so that every loop
runs along a row of pixels, and the machine does as many at once as its vectors hold. Reals are
float32, whose operations are written out one by one; sums are of integers, so their order is free.

All kernels stand in one file: numba keeps what it has compiled until this file changes, and would
not see a change in another one whose functions it has compiled into these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs import instructions as op
from jobs.compiled import compiled, types

Reals = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_ONE, _NLL_ONE = np.float32(2**24), np.float32(2**16)  # the fixed points of `Counts`
_LARGEST_NLL = np.float32(2**16)  # as in the reference
_ZERO, _UNIT = np.float32(0), np.float32(1)
_BLOCK = 192  # pixels whose logits of 21 classes stay in the first cache
_MOST_ADDED = 255  # scores whose sum is below 2^32 in fixed point
# A count and a sum in one integer, so that adding is one step: up to _MOST_ADDED blocks' scores
_SUM_BITS = 40
_COUNTED = 1 << _SUM_BITS

_int, _float, _void, _i32 = types.int64, types.float32, types.void, types.int32
_F1, _F2, _F3 = types.float32[::1], types.float32[:, ::1], types.float32[:, :, ::1]
_U1, _U2 = types.uint32[::1], types.uint32[:, ::1]
_I1, _L1, _L2, _L3 = _i32[::1], _int[::1], _int[:, ::1], _int[:, :, ::1]
_B1, _B2, _I2 = types.uint8[::1], types.uint8[:, ::1], _i32[:, ::1]

_LEAST = np.float32(-87)  # exp of it is far below the last place of any count
_PER_LN2, _LN2 = np.float32(1 / np.log(2)), np.float32(np.log(2))
_SHIFT = np.float32(1.5 * 2**23)  # added to a small real, it leaves the nearest integer
# (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2, least squares reweighted towards the least maximum
EXP_TERMS = (0.4999999403953552, 0.1666652113199234, 0.04166838899254799, 0.008368716575205326,
             0.001381459878757596)  # fmt: skip
_C0, _C1, _C2, _C3, _C4 = (np.float32(c) for c in EXP_TERMS)


@compiled(_float(_float))
def exp_negative(x: Any) -> Any:
    """exp(x) for x <= 0, one last place off at most where it is above 0.001; exp(-87) below -87.
    exp(0) is 1, and none is larger."""
    x = max(x, _LEAST)
    shifted = op.fma(x, _PER_LN2, _SHIFT)
    r = op.fma(shifted - _SHIFT, -_LN2, x)
    q = op.fma(op.fma(op.fma(op.fma(_C4, r, _C3), r, _C2), r, _C1), r, _C0)
    power = op.fma(op.fma(q, r, _UNIT), r, _UNIT)
    return op.float_of(np.int32(op.bits_of(power) + np.int32(op.bits_of(shifted) << np.int32(23))))


_ROOT_BITS = np.int32(np.float32(np.sqrt(0.5)).view(np.int32))
_D3, _D5, _D7, _D9 = (np.float32(2 / n) for n in (3, 5, 7, 9))


@compiled(_float(_float))
def log_of_sum(s: Any) -> Any:
    """log(s) for 1 <= s < 2^126, two last places off at most; log(1) is 0."""
    exponent = np.int32(np.int32(op.bits_of(s) - _ROOT_BITS) >> np.int32(23))
    m = op.float_of(np.int32(op.bits_of(s) - np.int32(exponent << np.int32(23))))
    f = (m - _UNIT) / (m + _UNIT)  # log(m) = 2 atanh(f), |f| <= 0.172
    g = f * f
    tail = op.fma(op.fma(op.fma(_D9, g, _D7), g, _D5), g, _D3)
    return op.fma(np.float32(exponent), _LN2, op.fma(tail * g, f, f + f))


@compiled(_void(_F3, _int, _I1, _I1, _F1, _F1, _F2))
def _widen(
    logits: Reals, y: int, left: Ints, right: Ints, near: Reals, far: Reals, wide: Reals
) -> None:
    for c in range(wide.shape[0]):
        row, out = logits[c, y], wide[c]
        for x in range(out.shape[0]):
            out[x] = op.fma(row[right[x]], far[x], row[left[x]] * near[x])


@compiled(_void(_B1, _I1, _F1))
def _split_labels(target: Bytes, label: Ints, labelled: Reals) -> None:
    """`labelled` is 1, or 0 at a void pixel, whose label becomes 0."""
    op.widest_vectors()
    for x in range(target.shape[0]):
        is_void = target[x] == 255
        label[x] = np.int32(0) if is_void else np.int32(target[x])
        labelled[x] = _ZERO if is_void else _UNIT


@compiled(_void(_F2, _F2, _float, _float, _int, _F2, _F1, _I1))
def _blend(
    above: Reals, below: Reals, near: Any, far: Any, start: int,
    logits: Reals, highest: Reals, prediction: Ints,
) -> None:  # fmt: skip
    """The logits between two rows, the highest of each pixel, and the first class that has it."""
    op.widest_vectors()
    stop = start + highest.shape[0]
    highest[:], prediction[:] = -np.inf, 0
    for c in range(logits.shape[0]):
        a, b, out = above[c][start:stop], below[c][start:stop], logits[c]
        for x in range(highest.shape[0]):
            z = op.fma(b[x], far, a[x] * near)
            out[x] = z
            if z > highest[x]:
                highest[x], prediction[x] = z, c


@compiled(_void(_F2, _I1, _F1))
def _take(plane: Reals, label: Ints, taken: Reals) -> None:
    for x in range(taken.shape[0]):
        taken[x] = plane[np.uint64(label[x]), x]


@compiled(_void(_F2, _F1, _F1))
def _exponentials(plane: Reals, highest: Reals, total: Reals) -> None:
    """Logits become exp(logit - highest); `total` is their sum over classes."""
    op.widest_vectors()
    total[:] = 0
    for c in range(plane.shape[0]):
        row = plane[c]
        for x in range(total.shape[0]):
            e = exp_negative(row[x] - highest[x])
            row[x] = e
            total[x] += e


@compiled(_int(_F1, _F1, _F1, _F1, _F1))
def _nll_and_scale(
    true: Reals, highest: Reals, labelled: Reals, total: Reals, fixed: Reals
) -> np.int64:
    """The sum of -log(score of the true class) in fixed point, from its logit, which becomes that
    score. `total` becomes what makes exponentials scores; both are 0 at void pixels."""
    op.widest_vectors()
    for x in range(total.shape[0]):
        below = highest[x] - true[x]
        nll = min(below + log_of_sum(total[x]), _LARGEST_NLL)
        fixed[x] = op.nearest(nll * labelled[x] * _NLL_ONE)
        total[x] = labelled[x] / total[x]
        true[x] = exp_negative(-below) * total[x]
    nlls = np.int64(0)
    for x in range(total.shape[0]):
        nlls += np.int64(fixed[x])
    return nlls


@compiled(_void(_F2, _F1, _F1, _U2))
def _to_scores(plane: Reals, scale: Reals, squares: Reals, totals: Any) -> None:
    """Exponentials become scores, which are added in fixed point to `totals`."""
    op.widest_vectors()
    squares[:] = 0
    for c in range(plane.shape[0]):
        row, total = plane[c], totals[c]
        for x in range(scale.shape[0]):
            p = row[x] * scale[x]
            row[x] = p
            squares[x] = op.fma(p, p, squares[x])
            total[x] += np.uint32(np.int32(op.nearest(p * _ONE)))


@compiled(_void(_F2, _int, _L2))
def add_bins(plane: Reals, pixels: int, packed: Longs) -> None:
    """Add scores [C, pixels] that are not in the lowest of bins [C, N]. Most of most classes are,
    and so have no step of their own."""
    num_bins, last = np.float32(packed.shape[1]), np.int32(packed.shape[1] - 1)
    for c in range(plane.shape[0]):
        row, bins = plane[c], packed[c]
        for start in range(0, pixels, op.LANES):
            above = op.where_at_least_one(row, start, num_bins)
            while above:
                p = row[np.uint64(start + op.lowest_bit(above))]
                above &= above - 1
                place = np.uint64(min(np.int32(p * num_bins), last))
                bins[place] += _COUNTED + np.int64(op.nearest(p * _ONE))


@compiled(_void(_L2, _U2, _L3))
def unpack_bins(packed: Longs, totals: Any, bins: Longs) -> None:
    """Add what was packed to bins [C, N, (count, ., sum)], and begin anew. The lowest bin gets what
    the others leave of the sum of all scores, and of a count of 0."""
    for c in range(packed.shape[0]):
        bins[c, 0, 2] += np.int64(totals[c].sum())
        for k in range(packed.shape[1]):
            count, total = packed[c, k] >> _SUM_BITS, packed[c, k] & (_COUNTED - 1)
            bins[c, k, 0] += count
            bins[c, k, 2] += total
            bins[c, 0, 0] -= count
            bins[c, 0, 2] -= total
    packed[:], totals[:] = 0, 0


@compiled(_int(_F1, _F1, _F1))
def _brier(squares: Reals, true: Reals, labelled: Reals) -> np.int64:
    op.widest_vectors()
    total = np.int64(0)
    for x in range(squares.shape[0]):
        score = np.float64(squares[x]) - 2.0 * np.float64(true[x]) + 1.0
        total += np.int64(op.nearest(score * np.float64(labelled[x]) * 2.0**24))
    return total


@compiled(_void(_I1, _I1, _F1, _F1, _F1, _int, _int, _I2))
def _place(
    label: Ints, prediction: Ints, labelled: Reals, true: Reals, confidence: Reals, classes: int,
    bins: int, places: Ints,
) -> None:  # fmt: skip
    """What `_add_pixels` adds, and where; void pixels have the place behind the last."""
    op.widest_vectors()
    confused, hit, top, fixed = places[0], places[1], places[2], places[3]
    num_classes, num_bins, last = np.int32(classes), np.int32(bins), np.int32(bins - 1)
    for x in range(label.shape[0]):
        true_bin = min(np.int32(true[x] * np.float32(num_bins)), last)
        top_bin = min(np.int32(confidence[x] * np.float32(num_bins)), last)
        row = label[x] if labelled[x] > 0 else num_classes
        confused[x] = np.int32(row * num_classes + (prediction[x] if labelled[x] > 0 else 0))
        hit[x] = np.int32(row * num_bins + (true_bin if labelled[x] > 0 else 0))
        right = np.int32(label[x] == prediction[x])
        top[x] = np.int32(top_bin + top_bin + right) if labelled[x] > 0 else np.int32(2 * bins)
        fixed[x] = np.int32(op.nearest(confidence[x] * _ONE))


@compiled(_void(_I2, _int, _L1, _L1, _L2))
def _add_pixels(places: Ints, pixels: int, confusion: Longs, hits: Longs, tops: Longs) -> None:
    for x in range(pixels):
        confusion[np.uint64(places[0, x])] += 1
        hits[np.uint64(places[1, x])] += 1
        tops[np.uint64(places[2, x]), 0] += 1
        tops[np.uint64(places[2, x]), 1] += places[3, x]


@compiled(_void(_F2, _F2, _float, _float, _int, _I1, _F1, _F2, _F2, _I2, _U2, _L2, _L1, _L1, _L2,
                _L1))  # fmt: skip
def _count_block(
    above: Reals, below: Reals, near: Any, far: Any, start: int, label: Ints, labelled: Reals,
    plane: Reals, reals: Reals, ints: Ints, totals: Any, packed: Longs,
    confusion: Longs, hits: Longs, tops: Longs, sums: Longs,
) -> None:  # fmt: skip
    """`count_rows` for the pixels of `label`, from `start` on, of a row between two rows of logits.
    plane [C, B], reals [5, B] and ints [5, B], B pixels or more, are room to work in; totals [C, B]
    are sums of scores."""
    n, num_classes = label.shape[0], plane.shape[0]
    highest, total, true, squares = reals[0][:n], reals[1][:n], reals[2][:n], reals[3][:n]
    prediction = ints[4][:n]
    _blend(above, below, near, far, start, plane, highest, prediction)
    _take(plane, label, true)
    _exponentials(plane, highest, total)
    sums[1] += _nll_and_scale(true, highest, labelled, total, reals[4])
    _to_scores(plane, total, squares, totals)
    add_bins(plane, n, packed)
    sums[0] += _brier(squares, true, labelled)
    _place(label, prediction, labelled, true, total, num_classes, packed.shape[1], ints)
    _add_pixels(ints, n, confusion, hits, tops)


@compiled(_void(_F3, _B2, _I1, _I1, _F1, _F1, _I1, _I1, _F1, _F1, _L1, _L1, _L2, _L3, _L1))
def count_rows(
    logits: Reals, target: Bytes,
    above: Ints, below: Ints, up: Reals, down: Reals,
    left: Ints, right: Ints, near: Reals, far: Reals,
    confusion: Longs, hits: Longs, tops: Longs, bins: Longs, sums: Longs,
) -> None:  # fmt: skip
    """Add the counts of the pixels of `target` [H, W], W a multiple of `LANES`, labels below C or
    255.

    A pixel lies between rows `above` and `below` of the logits [C, h, w], whose weights are `up`
    and `down`, and between columns `left` and `right`. confusion [C * C + 1]; hits [C * N + 1], of
    the true class; tops [2 N + 1, (count, sum)] by bin and whether right; void pixels add to what
    is behind the tables: to hits and confusion after label C - 1, to the last place of tops.
    bins [C, N, (count, ., sum)], without the number of labelled pixels, which is to be added to the
    lowest bin of each class; sums (Brier, nll)."""
    num_classes, width = logits.shape[0], target.shape[1]
    wide, held = np.empty((2, num_classes, width), np.float32), np.full(2, -1, np.int64)
    label, labelled = np.empty(width, np.int32), np.empty(width, np.float32)
    plane, reals = np.empty((num_classes, _BLOCK), np.float32), np.empty((5, _BLOCK), np.float32)
    ints, totals = np.empty((5, _BLOCK), np.int32), np.zeros((num_classes, _BLOCK), np.uint32)
    packed, added = np.zeros(bins.shape[:2], np.int64), 0
    for y in range(target.shape[0]):
        for row in (above[y], below[y]):  # neighbours, if they are two
            if held[row % 2] != row:
                _widen(logits, row, left, right, near, far, wide[row % 2])
                held[row % 2] = row
        _split_labels(target[y], label, labelled)
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            _count_block(
                wide[above[y] % 2], wide[below[y] % 2], up[y], down[y], start,
                label[start:stop], labelled[start:stop], plane, reals, ints, totals, packed,
                confusion, hits, tops, sums,
            )  # fmt: skip
            added += 1
            if added == _MOST_ADDED:
                unpack_bins(packed, totals, bins)
                added = 0
    unpack_bins(packed, totals, bins)
