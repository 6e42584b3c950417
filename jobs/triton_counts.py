"""`jobs.fused_counts` on a GPU, in Triton: a program counts a block of pixels. The operations on
float32 are those of `jobs.fused_kernel`, one by one and in its order, so that either gives the same
bits; sums are of integers, so programs may end in any order.

A program goes through the classes three times, for the highest logit, the sum of exponentials and
the scores, and blends a logit anew each time from the four around it, which stay in the cache: what
it keeps does not depend on the number of classes, and nothing goes to memory but counts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from data_prep.settings import VOID
from jobs.fused_counts import axis, check, check_finite, check_labels, of_whole_image
from jobs.fused_kernel import EXP_TERMS
from jobs.metrics.accumulate import LARGEST_NLL
from jobs.metrics.counts import Counts

# No product is merged with a sum where the kernel does not say so.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 8}
BLOCK = 512  # pixels of a program


def _real(value: float) -> Any:
    """A float32 for kernels."""
    return tl.constexpr(float(np.float32(value)))


_VOID = tl.constexpr(VOID)
_ONE, _NLL_ONE = tl.constexpr(2.0**24), tl.constexpr(2.0**16)  # the fixed points of `Counts`
_LARGEST_NLL = tl.constexpr(LARGEST_NLL)
# A score in fixed point, a pixel and a hit are added as one int64, so that one sum does for three.
_PIXEL, _HIT = tl.constexpr(2**37), tl.constexpr(2**50)
_LARGEST_BLOCK = tl.constexpr(2**12)  # whose scores add up to 2^36 at most

# see `jobs.fused_kernel` for all that follows
_LEAST, _PER_LN2, _LN2 = _real(-87), _real(1 / np.log(2)), _real(np.log(2))
_SHIFT = _real(1.5 * 2**23)
_C0, _C1, _C2, _C3, _C4 = (_real(c) for c in EXP_TERMS)
_ROOT_BITS = tl.constexpr(int(np.float32(np.sqrt(0.5)).view(np.int32)))
_D3, _D5, _D7, _D9 = (_real(2 / n) for n in (3, 5, 7, 9))
# a float32 from here on is an integer; float64 keeps a sign bit more
_WHOLE, _WHOLE64 = tl.constexpr(2.0**23), tl.constexpr(1.5 * 2.0**52)


@triton.jit
def _exp_negative(x: tensor) -> tensor:
    x = tl.maximum(x, _LEAST)
    shifted = tl.fma(x, _PER_LN2, _SHIFT)
    r = tl.fma(shifted - _SHIFT, -_LN2, x)
    q = tl.fma(tl.fma(tl.fma(tl.fma(r, _C4, _C3), r, _C2), r, _C1), r, _C0)
    power = tl.fma(tl.fma(q, r, 1.0), r, 1.0)
    bits = power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _log_of_sum(s: tensor) -> tensor:
    exponent = (s.to(tl.int32, bitcast=True) - _ROOT_BITS) >> 23
    m = (s.to(tl.int32, bitcast=True) - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.math.div_rn(m - 1.0, m + 1.0)
    g = f * f
    tail = tl.fma(tl.fma(tl.fma(g, _D9, _D7), g, _D5), g, _D3)
    return tl.fma(exponent.to(tl.float32), _LN2, tl.fma(tail * g, f, f + f))


@triton.jit
def _nearest(x: tensor) -> tensor:
    """The nearest integer to a float32 of 0 or more, the even one of two, as int64."""
    return tl.where(x < _WHOLE, (x + _WHOLE) - _WHOLE, x).to(tl.int64)


@triton.jit
def _bin(score: tensor, bins: constexpr) -> tensor:
    return tl.minimum((score * float(bins)).to(tl.int32), bins - 1)


@triton.jit
def _add_bins(score: tensor, hit: tensor, labelled: tensor, bins: constexpr, table: tensor) -> None:
    """Add the scores of labelled pixels, and which of them are hits, to a table [bins, (count,
    hits, sum)]."""
    packed = _nearest(score * _ONE) + _PIXEL + hit.to(tl.int64) * _HIT
    packed = tl.where(labelled, packed, 0)
    place = tl.where(labelled, _bin(score, bins), 0)
    last, k = tl.max(place), 0
    while k <= last:
        total = tl.sum(tl.where(place == k, packed, 0))
        if total != 0:
            row = table + 3 * k
            tl.atomic_add(row, total % _HIT // _PIXEL, sem="relaxed")
            tl.atomic_add(row + 1, total // _HIT, sem="relaxed")
            tl.atomic_add(row + 2, total % _PIXEL, sem="relaxed")
        k += 1


@triton.jit
def _logit(
    plane: tensor, above: tensor, below: tensor, up: tensor, down: tensor, left: tensor,
    right: tensor, near: tensor, far: tensor,
) -> tensor:  # fmt: skip
    """The logits between four places of a plane; first along rows."""
    upper = tl.fma(tl.load(plane + above + right), far, tl.load(plane + above + left) * near)
    lower = tl.fma(tl.load(plane + below + right), far, tl.load(plane + below + left) * near)
    return tl.fma(lower, down, upper * up)


@triton.jit(do_not_specialize=["h", "w", "height", "width"])
def count_pixels(
    logits: tensor, target: tensor, rows: tensor, row_shares: tensor, columns: tensor,
    column_shares: tensor, confusion: tensor, class_bins: tensor, top1_bins: tensor, sums: tensor,
    h: tensor, w: tensor, height: tensor, width: tensor,
    num_classes: constexpr, bins: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Add the counts of `BLOCK` pixels of `target` uint8 [height, width] to tables as `Counts` has
    them and sums (Brier, nll), all int64.

    logits: float32 [num_classes, h, w]. A pixel lies between two `rows` [2, height] of them, whose
    weights are `row_shares`, and two `columns` [2, width]. Labels are below num_classes or 255."""
    tl.static_assert(BLOCK <= _LARGEST_BLOCK)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    pixel = tl.where(inside, pixel, 0)  # what lies beyond the image is void
    label = tl.load(target + pixel, mask=inside, other=_VOID).to(tl.int32)
    labelled = label != _VOID
    y, x = pixel // width, pixel % width
    above, below = tl.load(rows + y) * w, tl.load(rows + height + y) * w
    up, down = tl.load(row_shares + y), tl.load(row_shares + height + y)
    left, right = tl.load(columns + x), tl.load(columns + width + x)
    near, far = tl.load(column_shares + x), tl.load(column_shares + width + x)
    size = (h * w).to(tl.int64)

    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    true = tl.zeros([BLOCK], tl.float32)
    prediction = tl.zeros([BLOCK], tl.int32)
    for c in range(num_classes):
        z = _logit(logits + c * size, above, below, up, down, left, right, near, far)
        prediction = tl.where(z > highest, c, prediction)
        highest = tl.where(z > highest, z, highest)
        true = tl.where(label == c, z, true)

    total = tl.zeros([BLOCK], tl.float32)
    for c in range(num_classes):
        z = _logit(logits + c * size, above, below, up, down, left, right, near, far)
        total += _exp_negative(z - highest)
    nll = tl.minimum((highest - true) + _log_of_sum(total), _LARGEST_NLL)
    nll = tl.where(labelled, _nearest(nll * _NLL_ONE), 0)
    tl.atomic_add(sums + 1, tl.sum(nll), sem="relaxed")

    scale = tl.math.div_rn(1.0, total)
    squares = tl.zeros([BLOCK], tl.float32)
    for c in range(num_classes):
        z = _logit(logits + c * size, above, below, up, down, left, right, near, far)
        score = _exp_negative(z - highest) * scale
        squares = tl.fma(score, score, squares)
        true = tl.where(label == c, score, true)
        _add_bins(score, label == c, labelled, bins, class_bins + 3 * c * bins)
    brier = squares.to(tl.float64) - 2.0 * true.to(tl.float64) + 1.0
    brier = ((brier * _ONE + _WHOLE64) - _WHOLE64).to(tl.int64)
    tl.atomic_add(sums, tl.sum(tl.where(labelled, brier, 0)), sem="relaxed")

    _add_bins(scale, label == prediction, labelled, bins, top1_bins)  # exp(0) is 1
    ones = tl.full([BLOCK], 1, tl.int64)
    place = confusion + label * num_classes + prediction
    tl.atomic_add(place, ones, mask=labelled, sem="relaxed")


@torch.no_grad()
def count_on_gpu(logits: Tensor, target: Tensor, bins: int) -> Counts:
    """As `jobs.fused_counts.count_upsampled`, on the GPU of `logits`. The same bits for any number
    of pixels in a program. Triton's interpreter (TRITON_INTERPRET=1) takes logits of the CPU."""
    check(logits, target, bins)
    check_finite(*map(float, torch.aminmax(logits)))
    labels = target.cpu().numpy()
    check_labels(labels, len(logits))
    (num_classes, *size), device = logits.shape, logits.device
    empty = Counts.zeros(num_classes, bins)
    shapes = empty.confusion.shape, empty.class_bins.shape, empty.top1_bins.shape, (2,)
    tables = [torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes]
    count_pixels[(triton.cdiv(labels.size, BLOCK),)](
        logits.float().contiguous(), target.to(device).contiguous(),
        *_between(size[0], labels.shape[0], device), *_between(size[1], labels.shape[1], device),
        *tables, *size, *labels.shape, num_classes, bins, BLOCK, **OPTIONS,
    )  # fmt: skip
    confusion, class_bins, top1_bins, sums = (table.cpu().numpy() for table in tables)
    plain = of_whole_image(labels, num_classes, bins)
    return replace(plain, confusion=confusion, class_bins=class_bins, top1_bins=top1_bins,
                   brier=sums[0], nll=sums[1])  # fmt: skip


@lru_cache(maxsize=64)
def _between(places: int, pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`axis` on the device: its places int32 [2, pixels], and their weights."""
    found = axis(places, pixels)
    pairs = (found.first, found.second), (found.near, found.far)
    first, second = (torch.from_numpy(np.stack(pair)).to(device) for pair in pairs)
    return first, second
