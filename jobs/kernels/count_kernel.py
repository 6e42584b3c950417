"""The kernel of `jobs.kernels.fused_counts`. It counts `op.LANES` pixels of a row at once, and
holds what does not depend on the class in registers. Reals are float32, whose operations are
written out one by one; sums are of integers, so their order is free.

Columns of `_BLOCK` pixels are counted from top to bottom, so that the logits of all classes around
and at the pixels stay in the first cache.

All kernels stand in one file: numba keeps what it has compiled until this file changes, and would
not see a change in another one whose functions it has compiled into these. So this one holds a
digest of those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs import vectors as op
from jobs.kernels.numba_compile import compiled, types
from jobs.vector_memory import gather, load, permute, store

Reals = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Vector = Any  # of `LANES` numbers

# the digest of jobs/vectors.py and jobs/vector_memory.py, which a test looks at
VECTORS = "e0b6f27d122c"

_ONE, _NLL_ONE = np.float32(2**24), np.float32(2**16)  # the fixed points of `Counts`
_LARGEST_NLL = np.float32(2**16)  # as in the reference
_ZERO, _UNIT = np.float32(0), np.float32(1)
_BLOCK = 64  # pixels; three planes of 21 classes take a third of that cache
_MOST_ADDED = 255  # scores whose sum is below 2^32 in fixed point
# A count and a sum in one integer, so that adding is one step: what _MOST_ADDED vectors of a class
# have beyond its lowest bin
_SUM_BITS = 40
_COUNTED = 1 << _SUM_BITS

_int, _float, _void = types.int64, types.float32, types.void
_F1, _F2, _F3 = types.float32[::1], types.float32[:, ::1], types.float32[:, :, ::1]
_I1, _L1, _L2, _L3 = types.int32[::1], _int[::1], _int[:, ::1], _int[:, :, ::1]
_U2, _B2 = types.uint32[:, ::1], types.uint8[:, ::1]

_LEAST = np.float32(-87)  # exp of it is far below the last place of any count
_PER_LN2, _LN2 = np.float32(1 / np.log(2)), np.float32(np.log(2))
_SHIFT = np.float32(1.5 * 2**23)  # added to a small real, it leaves the nearest integer
# (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2, least squares reweighted towards the least maximum
EXP_TERMS = (0.4999999403953552, 0.1666652113199234, 0.04166838899254799, 0.008368716575205326,
             0.001381459878757596)  # fmt: skip
_C0, _C1, _C2, _C3, _C4 = (np.float32(c) for c in EXP_TERMS)
_EXPONENT = np.int32(23)  # where it begins among the bits


@compiled(op.REALS(op.REALS))
def exp_negative(x: Vector) -> Vector:
    """exp(x) for x <= 0, one last place off at most where it is above 0.001; exp(-87) below -87.
    exp(0) is 1, and none is larger."""
    x = op.larger(x, _LEAST)
    shifted = op.fma(x, _PER_LN2, _SHIFT)
    r = op.fma(shifted - _SHIFT, -_LN2, x)
    q = op.fma(op.fma(op.fma(op.fma(r, _C4, _C3), r, _C2), r, _C1), r, _C0)
    power = op.fma(op.fma(q, r, _UNIT), r, _UNIT)
    return op.float_of(op.bits_of(power) + (op.bits_of(shifted) << _EXPONENT))


_ROOT_BITS = np.int32(np.float32(np.sqrt(0.5)).view(np.int32))
_D3, _D5, _D7, _D9 = (np.float32(2 / n) for n in (3, 5, 7, 9))


@compiled(op.REALS(op.REALS))
def log_of_sum(s: Vector) -> Vector:
    """log(s) for 1 <= s < 2^126, two last places off at most; log(1) is 0."""
    exponent = (op.bits_of(s) - _ROOT_BITS) >> _EXPONENT
    m = op.float_of(op.bits_of(s) - (exponent << _EXPONENT))
    f = (m - _UNIT) / (m + _UNIT)  # log(m) = 2 atanh(f), |f| <= 0.172
    g = f * f
    tail = op.fma(op.fma(op.fma(g, _D9, _D7), g, _D5), g, _D3)
    return op.fma(op.reals(exponent), _LN2, op.fma(tail * g, f, f + f))


_of_neighbours = permute if op.AVX512 else gather  # LLVM must not even see what is not there


@compiled(op.REALS(_F3, _int, op.INTS, types.boolean))
def _pick(logits: Reals, row: int, places: Vector, are_near: bool) -> Vector:
    """The logits of a row at `places`, which do not decrease. They differ by less than `LANES` if
    they are near, as all are where pixels are no fewer than logits: then one load has them, for a
    gather's sixteen."""
    if are_near:
        return _of_neighbours(logits, row, places)
    return gather(logits, row, places)


@compiled(_void(_F3, _int, _I1, _I1, _F1, _F1, _int, _int, _F2))
def _widen(
    logits: Reals, y: int, left: Ints, right: Ints, near: Reals, far: Reals, start: int,
    pixels: int, wide: Reals,
) -> None:  # fmt: skip
    """A row of logits at `pixels` columns from `start` on, [C, pixels of _BLOCK]."""
    _, height, width = logits.shape
    for x in range(0, pixels, op.LANES):
        first, second = load(left, start + x), load(right, start + x)
        of_first, of_second = load(near, start + x), load(far, start + x)
        last = start + x + op.LANES - 1
        are_near = max(left[last] - left[start + x], right[last] - right[start + x]) < op.LANES
        for c in range(wide.shape[0]):
            row = (c * height + y) * width
            own = _pick(logits, row, first, are_near) * of_first
            other = _pick(logits, row, second, are_near)
            store(wide, c * _BLOCK + x, op.fma(other, of_second, own))


@compiled(types.Tuple((op.REALS, op.INTS))(_F2, _F2, _float, _float, _int, _F2))
def _blend(
    above: Reals, below: Reals, near: Any, far: Any, x: int, plane: Reals
) -> tuple[Vector, Vector]:
    """The logits between two rows; the highest of each pixel, and the first class that has it."""
    highest, prediction = op.in_all_lanes(np.float32(-np.inf)), op.in_all_lanes(np.int32(0))
    for c in range(plane.shape[0]):
        at = c * _BLOCK + x
        z = op.fma(load(below, at), far, load(above, at) * near)
        store(plane, at, z)
        prediction = op.where(z > highest, np.int32(c), prediction)
        highest = op.larger(z, highest)
    return highest, prediction


@compiled(op.REALS(_F2, _int, op.REALS))
def _exponentials(plane: Reals, x: int, highest: Vector) -> Vector:
    """Logits become exp(logit - highest); their sum over classes."""
    total = op.in_all_lanes(_ZERO)
    for c in range(plane.shape[0]):
        e = exp_negative(load(plane, c * _BLOCK + x) - highest)
        store(plane, c * _BLOCK + x, e)
        total = total + e
    return total


@compiled(types.Tuple((op.REALS, _int))(_F2, _int, op.REALS, _int, _U2, _F1, _I1, _int))
def list_scores(
    plane: Reals, x: int, scale: Vector, bins: int, totals: Any, scores: Reals, places: Ints,
    listed: int,
) -> tuple[Vector, int]:  # fmt: skip
    """Exponentials times `scale` are scores. In fixed point they are added to `totals` [C, LANES];
    those that are not in the lowest bin, as most are, are listed: they in `scores`, the first bin
    of their class in `places`, from `listed` on. The sum of their squares, and the list's new
    length; both arrays have room for `LANES` more."""
    squares = op.in_all_lanes(_ZERO)
    for c in range(plane.shape[0]):
        p = load(plane, c * _BLOCK + x) * scale
        squares = op.fma(p, p, squares)
        store(totals, c * op.LANES, load(totals, c * op.LANES) + op.nearest_int(p * _ONE))
        above = p * np.float32(bins) >= _UNIT
        if op.AVX512 or op.num_set(above):  # noise has some nearly always, pictures seldom
            store(scores, listed, op.compress(p, above))
            store(places, listed, op.in_all_lanes(np.int32(c * bins)))
            listed += op.num_set(above)
    return squares, listed


@compiled(_void(_F1, _I1, _int, _int, _I1, _L1))
def add_listed(
    scores: Reals, places: Ints, listed: int, bins: int, fixed: Ints, packed: Longs
) -> None:
    """Add each score that is listed to its bin: one behind the first bin of its class that
    `places` has, and becomes. `fixed` is room to work in, as long as `places`."""
    for at in range(0, listed, op.LANES):
        p = load(scores, at)
        place = op.smaller(op.ints(p * np.float32(bins)), np.int32(bins - 1))
        store(places, at, load(places, at) + place)
        store(fixed, at, op.nearest_int(p * _ONE))
    for at in range(listed):
        packed[np.uint64(places[at])] += _COUNTED + np.int64(fixed[at])


@compiled(types.UniTuple(_int, 2)(_int))
def _unpacked(both: Any) -> tuple[Any, Any]:
    return both >> _SUM_BITS, both & (_COUNTED - 1)


@compiled(_void(_L1, _U2, _L3, _L2))
def unpack_bins(packed: Longs, totals: Any, bins: Longs, tops: Longs) -> None:
    """Add what was packed to bins [C, N, (count, ., sum)] and, what is behind these, to tops
    [.., (count, sum)], and begin anew. The lowest bin gets what the others leave of the sum of all
    scores, and of a count of 0."""
    num_classes, num_bins = bins.shape[:2]
    for c in range(num_classes):
        bins[c, 0, 2] += np.int64(totals[c].sum())
        for k in range(num_bins):
            count, total = _unpacked(packed[c * num_bins + k])
            bins[c, k, 0] += count
            bins[c, k, 2] += total
            bins[c, 0, 0] -= count
            bins[c, 0, 2] -= total
    for place in range(tops.shape[0]):
        count, total = _unpacked(packed[num_classes * num_bins + place])
        tops[place, 0] += count
        tops[place, 1] += total
    packed[:], totals[:] = 0, 0


@compiled(_int(_F2, _F2, _float, _float, _B2, _int, _int, _F2, _int, _U2, _F1, _I1, _I1, _I1, _L1))
def _score_pixels(
    above: Reals, below: Reals, near: Any, far: Any, target: Bytes, start: int, pixels: int,
    plane: Reals, bins: int, totals: Any, scores: Reals, places: Ints,
    confused: Ints, hit: Ints, sums: Longs,
) -> int:  # fmt: skip
    """`count_rows` for `pixels` of the label map from `start` on, between two rows of logits; but
    scores are listed, the highest with the bins of wrong, right and void pixels behind those of
    classes, and `confused` and `hit` are the places to which a pixel adds 1. The list's length."""
    classes, listed = np.int32(plane.shape[0]), 0
    nlls, briers = op.in_all_lanes(np.int64(0)), op.in_all_lanes(np.int64(0))
    for x in range(0, pixels, op.LANES):
        label = load(target, start + x)
        is_void = label == np.int32(255)
        label, labelled = op.where(is_void, np.int32(0), label), op.where(is_void, _ZERO, _UNIT)
        highest, prediction = _blend(above, below, near, far, x, plane)
        true_class = label * np.int32(_BLOCK) + op.lane_numbers()
        behind = gather(plane, x, true_class) - highest
        total = _exponentials(plane, x, highest)
        nll = op.smaller(log_of_sum(total) - behind, _LARGEST_NLL)
        nlls = nlls + op.longs(op.nearest(nll * labelled * _NLL_ONE))
        scale = labelled / total
        true = exp_negative(behind) * scale  # sooner computed anew than gathered
        squares, listed = list_scores(plane, x, scale, bins, totals, scores, places, listed)
        brier = op.doubles(squares) - 2.0 * op.doubles(true) + 1.0
        briers = briers + op.longs(op.nearest(brier * op.doubles(labelled) * 2.0**24))
        row = op.where(is_void, classes, label)
        store(confused, x, row * classes + op.where(is_void, np.int32(0), prediction))
        true_bin = op.smaller(op.ints(true * np.float32(bins)), np.int32(bins - 1))
        store(hit, x, row * np.int32(bins) + true_bin)
        right = op.where(
            is_void, np.int32(2), op.where(label == prediction, np.int32(1), np.int32(0))
        )
        store(scores, listed, scale)  # exp(0) is 1
        of_top = op.where(is_void, np.int32(2), right) + classes
        store(places, listed, of_top * np.int32(bins))
        listed += op.LANES
    sums[0] += op.sum_of_lanes(briers)
    sums[1] += op.sum_of_lanes(nlls)
    return listed


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
    the true class; tops [3 N, (count, sum)], of wrong, right and void pixels by bin; void pixels
    add to the places of hits and confusion behind label C - 1. bins [C, N, (count, ., sum)],
    without the number of labelled pixels, which is to be added to the lowest bin of each class;
    sums (Brier, nll)."""
    classes, num_bins = bins.shape[:2]
    width = target.shape[1]
    wide, plane = (
        np.empty((2, classes, _BLOCK), np.float32),
        np.empty((classes, _BLOCK), np.float32),
    )
    held, totals = np.empty(2, np.int64), np.zeros((classes, op.LANES), np.uint32)
    most = (classes + 1) * _BLOCK + op.LANES
    scores, places = np.zeros(most, np.float32), np.zeros(most, np.int32)
    fixed, confused, hit = (
        np.zeros(most, np.int32),
        np.empty(_BLOCK, np.int32),
        np.empty(_BLOCK, np.int32),
    )
    packed, added = np.zeros((classes + 3) * num_bins, np.int64), 0
    for start in range(0, width, _BLOCK):
        pixels = min(_BLOCK, width - start)
        held[:] = -1
        for y in range(target.shape[0]):
            for row in (above[y], below[y]):  # neighbours, if they are two
                if held[row % 2] != row:
                    _widen(logits, row, left, right, near, far, start, pixels, wide[row % 2])
                    held[row % 2] = row
            listed = _score_pixels(
                wide[above[y] % 2], wide[below[y] % 2], up[y], down[y], target, y * width + start,
                pixels, plane, num_bins, totals, scores, places, confused, hit, sums,
            )  # fmt: skip
            add_listed(scores, places, listed, num_bins, fixed, packed)
            for x in range(pixels):
                confusion[np.uint64(confused[x])] += 1
                hits[np.uint64(hit[x])] += 1
            added += _BLOCK // op.LANES
            if added + _BLOCK // op.LANES > _MOST_ADDED:
                unpack_bins(packed, totals, bins, tops)
                added = 0
    unpack_bins(packed, totals, bins, tops)
