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

from jobs.compiled import compiled, types
from jobs.instructions import bits_of, float_of, fma, nearest, widest_vectors

Reals = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_ONE, _NLL_ONE = np.float32(2**24), np.float32(2**16)  # the fixed points of `Counts`
_LARGEST_NLL = np.float32(2**16)  # as in the reference
_ZERO, _UNIT = np.float32(0), np.float32(1)
_BLOCK = 256  # pixels whose logits of 21 classes stay in the first cache

_int, _float, _void, _i32 = types.int64, types.float32, types.void, types.int32
_F1, _F2, _F3 = types.float32[::1], types.float32[:, ::1], types.float32[:, :, ::1]
_I1, _L1, _L2, _L3 = _i32[::1], _int[::1], _int[:, ::1], _int[:, :, ::1]
_B1, _B2 = types.uint8[::1], types.uint8[:, ::1]


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
    shifted = fma(x, _PER_LN2, _SHIFT)
    r = fma(shifted - _SHIFT, -_LN2, x)
    q = fma(fma(fma(fma(_C4, r, _C3), r, _C2), r, _C1), r, _C0)
    power = fma(fma(q, r, _UNIT), r, _UNIT)
    return float_of(np.int32(bits_of(power) + np.int32(bits_of(shifted) << np.int32(23))))


_ROOT_BITS = np.int32(np.float32(np.sqrt(0.5)).view(np.int32))
_D3, _D5, _D7, _D9 = (np.float32(2 / n) for n in (3, 5, 7, 9))


@compiled(_float(_float))
def log_of_sum(s: Any) -> Any:
    """log(s) for 1 <= s < 2^126, two last places off at most; log(1) is 0."""
    exponent = np.int32(np.int32(bits_of(s) - _ROOT_BITS) >> np.int32(23))
    m = float_of(np.int32(bits_of(s) - np.int32(exponent << np.int32(23))))
    f = (m - _UNIT) / (m + _UNIT)  # log(m) = 2 atanh(f), |f| <= 0.172
    g = f * f
    tail = fma(fma(fma(_D9, g, _D7), g, _D5), g, _D3)
    return fma(np.float32(exponent), _LN2, fma(tail * g, f, f + f))


@compiled(_void(_F3, _int, _I1, _I1, _F1, _F1, _F2))
def _widen(
    logits: Reals, y: int, left: Ints, right: Ints, near: Reals, far: Reals, wide: Reals
) -> None:
    for c in range(wide.shape[0]):
        row, out = logits[c, y], wide[c]
        for x in range(out.shape[0]):
            out[x] = fma(row[right[x]], far[x], row[left[x]] * near[x])


@compiled(_void(_B1, _I1, _F1))
def _split_labels(target: Bytes, label: Ints, labelled: Reals) -> None:
    """`labelled` is 1, or 0 at a void pixel, whose label becomes 0."""
    widest_vectors()
    for x in range(target.shape[0]):
        is_void = target[x] == 255
        label[x] = np.int32(0) if is_void else np.int32(target[x])
        labelled[x] = _ZERO if is_void else _UNIT


@compiled(_void(_F2, _F2, _float, _float, _int, _int, _F2, _F1, _I1))
def _blend(
    above: Reals, below: Reals, near: Any, far: Any, start: int, stop: int,
    logits: Reals, highest: Reals, prediction: Ints,
) -> None:  # fmt: skip
    """The logits between two rows, the highest of each pixel, and the first class that has it."""
    widest_vectors()
    highest, prediction = highest[start:stop], prediction[start:stop]
    for x in range(highest.shape[0]):
        highest[x], prediction[x] = -np.inf, 0
    for c in range(logits.shape[0]):
        a, b, out = above[c][start:stop], below[c][start:stop], logits[c][start:stop]
        for x in range(highest.shape[0]):
            z = fma(b[x], far, a[x] * near)
            out[x] = z
            if z > highest[x]:
                highest[x], prediction[x] = z, c


@compiled(_void(_F2, _I1, _int, _int, _F1))
def _take(plane: Reals, label: Ints, start: int, stop: int, taken: Reals) -> None:
    for x in range(start, stop):
        taken[x] = plane[np.uint64(label[x]), x]


@compiled(_void(_F2, _F1, _int, _int, _F1))
def _exponentials(plane: Reals, highest: Reals, start: int, stop: int, total: Reals) -> None:
    """Logits become exp(logit - highest); `total` is their sum over classes."""
    widest_vectors()
    highest, total = highest[start:stop], total[start:stop]
    for x in range(total.shape[0]):
        total[x] = 0
    for c in range(plane.shape[0]):
        row = plane[c][start:stop]
        for x in range(total.shape[0]):
            e = exp_negative(row[x] - highest[x])
            row[x] = e
            total[x] += e


@compiled(_int(_F1, _F1, _F1, _F1))
def _nll_and_scale(true: Reals, highest: Reals, labelled: Reals, total: Reals) -> np.int64:
    """The sum of -log(score of the true class) in fixed point, from its logit, which `true` loses.
    `total` becomes what makes exponentials scores, 0 at void pixels."""
    widest_vectors()
    for x in range(total.shape[0]):
        nll = min((highest[x] - true[x]) + log_of_sum(total[x]), _LARGEST_NLL)
        true[x] = nearest(nll * labelled[x] * _NLL_ONE)
        total[x] = labelled[x] / total[x]
    nlls = np.int64(0)
    for x in range(total.shape[0]):
        nlls += np.int64(true[x])
    return nlls


@compiled(_int(_F1, _F1, _I1, _F1))
def _to_scores(row: Reals, scale: Reals, fixed: Ints, squares: Reals) -> np.int64:
    """Exponentials become scores, in `fixed` in fixed point, of which the highest is returned."""
    widest_vectors()
    highest = np.int32(0)
    for x in range(row.shape[0]):
        p = row[x] * scale[x]
        row[x] = p
        squares[x] = fma(p, p, squares[x])
        whole = np.int32(nearest(p * _ONE))
        fixed[x] = whole
        highest = max(highest, whole)
    return np.int64(highest)


@compiled(types.UniTuple(_int, 4)(_F1, _I1, _float, _float))
def _reached(row: Reals, fixed: Ints, first: Any, second: Any) -> tuple[np.int64, ...]:
    """How many scores reach the first edge, and their sum modulo 2^32; the same of the second."""
    widest_vectors()
    count1, total1, count2, total2 = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    for x in range(row.shape[0]):
        p, whole = row[x], np.uint32(fixed[x])
        count1 = np.uint32(count1 + np.uint32(p >= first))
        total1 = np.uint32(total1 + (whole if p >= first else np.uint32(0)))
        count2 = np.uint32(count2 + np.uint32(p >= second))
        total2 = np.uint32(total2 + (whole if p >= second else np.uint32(0)))
    return np.int64(count1), np.int64(total1), np.int64(count2), np.int64(total2)


@compiled(_void(_F1, _I1, _int, _int, _F1, _L1, _L1, _L2))
def _add_bins(
    row: Reals, fixed: Ints, labelled: int, highest: int, edges: Reals, count: Longs, total: Longs,
    bins: Longs,
) -> None:  # fmt: skip
    """Add a row of scores, those of void pixels being 0, to bins [N, (count, ., sum)].

    A bin's sum is its count times its lowest score, and a rest below 2^32 in a row of at most 250 N
    pixels: so it is enough to know it modulo 2^32, and vectors of 32 bits do."""
    in_use = 1
    while highest >= np.int64(edges[in_use] * _ONE):
        in_use += 1
    _, total[0], count[1], total[1] = _reached(row, fixed, _ZERO, edges[1])
    count[0] = labelled  # void pixels reach it too
    for k in range(2, in_use, 2):
        count[k], total[k], count[k + 1], total[k + 1] = _reached(
            row, fixed, edges[k], edges[k + 1]
        )
    count[in_use], total[in_use] = 0, 0
    for k in range(in_use):
        number = count[k] - count[k + 1]
        least = number * np.int64(edges[k] * _ONE)
        bins[k, 0] += number
        bins[k, 2] += least + ((total[k] - total[k + 1] - least) & 0xFFFFFFFF)


@compiled(_int(_F1, _F1, _F1))
def _brier(squares: Reals, true: Reals, labelled: Reals) -> np.int64:
    widest_vectors()
    total = np.int64(0)
    for x in range(squares.shape[0]):
        score = np.float64(squares[x]) - 2.0 * np.float64(true[x]) + 1.0
        total += np.int64(nearest(score * np.float64(labelled[x]) * 2.0**24))
    return total


@compiled(_void(_I1, _I1, _F1, _F1, _F1, _int, _int, types.int32[:, ::1]))
def _place(
    label: Ints, prediction: Ints, labelled: Reals, true: Reals, confidence: Reals, classes: int,
    bins: int, places: Ints,
) -> None:  # fmt: skip
    """What `_add_pixels` adds, and where; void pixels have the place behind the last."""
    widest_vectors()
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
        fixed[x] = np.int32(nearest(confidence[x] * _ONE))


@compiled(_void(types.int32[:, ::1], _L1, _L1, _L2))
def _add_pixels(places: Ints, confusion: Longs, hits: Longs, tops: Longs) -> None:
    for x in range(places.shape[1]):
        confusion[np.uint64(places[0, x])] += 1
        hits[np.uint64(places[1, x])] += 1
        tops[np.uint64(places[2, x]), 0] += 1
        tops[np.uint64(places[2, x]), 1] += places[3, x]


@compiled(_void(_F3, _B2, _I1, _I1, _F1, _F1, _I1, _I1, _F1, _F1, _F1, _L1, _L1, _L2, _L3, _L1))
def count_rows(
    logits: Reals, target: Bytes,
    above: Ints, below: Ints, up: Reals, down: Reals,
    left: Ints, right: Ints, near: Reals, far: Reals,
    edges: Reals, confusion: Longs, hits: Longs, tops: Longs, bins: Longs, sums: Longs,
) -> None:  # fmt: skip
    """Add the counts of the pixels of `target` [H, W], W <= 250 N, labels below C or 255.

    A pixel lies between rows `above` and `below` of the logits [C, h, w], whose weights are `up`
    and `down`, and between columns `left` and `right`. `edges` [N + 2]: the least score of each
    bin, and twice more than a score can be. confusion [C * C + 1]; hits [C * N + 1], of the true
    class; tops [2 N + 1, (count, sum)] by bin and whether right; void pixels add to what is behind
    the tables: to hits and confusion after label C - 1, to the last place of tops.
    bins [C, N, (count, ., sum)]; sums (Brier, nll)."""
    num_classes, width, num_bins = logits.shape[0], target.shape[1], bins.shape[1]
    wide, held = np.empty((2, num_classes, width), np.float32), np.full(2, -1, np.int64)
    plane, reals = np.empty((num_classes, width), np.float32), np.empty((5, width), np.float32)
    highest, total, true, squares, labelled = reals[0], reals[1], reals[2], reals[3], reals[4]
    places, ints = np.empty((4, width), np.int32), np.empty((3, width), np.int32)
    prediction, label, fixed = ints[0], ints[1], ints[2]
    cumulated = np.empty((2, num_bins + 2), np.int64)
    for y in range(target.shape[0]):
        for row in (above[y], below[y]):  # neighbours, if they are two
            if held[row % 2] != row:
                _widen(logits, row, left, right, near, far, wide[row % 2])
                held[row % 2] = row
        _split_labels(target[y], label, labelled)
        for x in range(0, width, _BLOCK):
            end = min(x + _BLOCK, width)
            _blend(wide[above[y] % 2], wide[below[y] % 2], up[y], down[y], x, end, plane, highest,
                   prediction)  # fmt: skip
            _take(plane, label, x, end, true)
            _exponentials(plane, highest, x, end, total)
        sums[1] += _nll_and_scale(true, highest, labelled, total)
        squares[:] = 0
        num_labelled = np.int64(labelled.sum())
        for c in range(num_classes):
            most = _to_scores(plane[c], total, fixed, squares)
            _add_bins(
                plane[c], fixed, num_labelled, most, edges, cumulated[0], cumulated[1], bins[c]
            )
        _take(plane, label, 0, width, true)
        sums[0] += _brier(squares, true, labelled)
        _place(label, prediction, labelled, true, total, num_classes, num_bins, places)
        _add_pixels(places, confusion, hits, tops)
