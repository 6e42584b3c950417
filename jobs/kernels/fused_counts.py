"""The counts of one image in one pass over logits at any stride: upsampling, softmax, prediction
and all counts, a few pixels at once, so that nothing of the image's size is stored but its label
map.

They are those of the plain way, `upsample` and `jobs.metrics.reference.count_image`, but for
rounding: decisions differ only for pixels that are a few last places from another one. It runs on
the processor, wherever the logits were made: at stride 8 they are a 64th of the scores.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.settings import VOID
from jobs.kernels.count_kernel import Bytes, Ints, Reals, count_rows
from jobs.metrics.counts import Counts
from jobs.vectors import LANES

_FEWEST_ROWS = 32  # for a thread to be worth its start


class Axis(NamedTuple):
    """Of each pixel along an axis: the two places of the logits it lies between, and their
    weights."""

    first: Ints
    second: Ints
    near: Reals
    far: Reals

    def part(self, window: slice) -> Axis:
        """Of the pixels in `window`."""
        return Axis(self.first[window], self.second[window], self.near[window], self.far[window])

    def longer(self, pixels: int) -> Axis:
        """The same with `pixels` more at its end, where its last one is."""
        places, weights = (self.first, self.second), (self.near, self.far)
        first, second = (np.pad(part, (0, pixels), "edge") for part in places)
        near, far = (np.pad(part, (0, pixels), "edge") for part in weights)
        return Axis(first, second, near, far)


def axis(places: int, pixels: int) -> Axis:
    """As bilinear interpolation with `align_corners=False` places them in float32, in PyTorch on a
    GPU and on processors with fused multiply-add: scale * (x + 1/2) - 1/2 is rounded once."""
    scale = np.float64(np.float32(places) / np.float32(pixels))
    exact = scale * (np.arange(pixels) + 0.5) - 0.5  # in float64 without rounding
    position = np.maximum(exact.astype(np.float32), np.float32(0))
    first = np.minimum(position.astype(np.int32), np.int32(places - 1))
    far = np.clip(position - first.astype(np.float32), np.float32(0), np.float32(1))
    return Axis(first, np.minimum(first + np.int32(1), places - 1).astype(np.int32), 1 - far, far)


@torch.no_grad()
def count_upsampled(logits: Tensor, target: Tensor, bins: int, threads: int = 1) -> Counts:
    """Counts of one image from its logits [C, h, w] at any stride, taken as float32, and its label
    map uint8 [H, W] of labels below C or void. The same bits for any number of threads.

    Raises `ValueError` for wrong shapes or types, a label that is no class, and logits that are not
    all finite.
    """
    check(logits, target, bins)
    planes = logits.float().cpu().contiguous().numpy()
    labels = target.cpu().contiguous().numpy()
    # by numpy: torch's own threads would wait beside ours for more work
    check_finite(float(planes.min()), float(planes.max()))
    check_labels(labels, len(planes))
    bands, count = _bands(len(labels), threads), _Rows(planes, labels, bins)
    # this thread waits: where it counts a band too, the scheduler may wake the other one beside it,
    # and leave both on one core for dozens of milliseconds
    found = _pool(threads).map(count, bands) if len(bands) > 1 else map(count, bands)
    return sum(found, of_whole_image(labels, len(planes), bins))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: to begin one takes as long as it counts."""
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_pool.cache_clear)  # where its threads are not


def check(logits: Tensor, target: Tensor, bins: int) -> None:
    """Raise `ValueError` for shapes and types that are not those of `count_upsampled`."""
    if logits.ndim != 3 or target.ndim != 2 or target.dtype != torch.uint8:
        raise ValueError(
            f"logits must be [C, h, w] and target uint8 [H, W], not {list(logits.shape)} and "
            f"{list(target.shape)} of {target.dtype}"
        )
    if bins < 1 or 0 in logits.shape or len(logits) > VOID:
        raise ValueError(f"1 to {VOID} classes and a bin, not {list(logits.shape)} and {bins}")


def check_finite(lowest: float, highest: float) -> None:
    """Raise `ValueError` if logits, whose ends these are, are not all finite; nan is both ends."""
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError("logits contain nan or infinity, so they give no scores")


def check_labels(labels: Bytes, num_classes: int) -> None:
    """Raise `ValueError` for a label that is neither below `num_classes` nor void."""
    highest = int((labels + np.uint8(1)).max(initial=0)) - 1  # VOID + 1 is 0 there
    if highest >= num_classes:
        raise ValueError(
            f"label {highest} is neither one of {num_classes} classes nor void ({VOID})"
        )


def _bands(height: int, threads: int) -> list[slice]:
    """The rows for each thread."""
    bands = max(1, min(threads, height // _FEWEST_ROWS))
    return [slice(height * i // bands, height * (i + 1) // bands) for i in range(bands)]


class _Rows:
    """Counts the pixels of some rows of an image, but for what `of_whole_image` counts."""

    def __init__(self, planes: Reals, labels: Bytes, bins: int) -> None:
        more = -labels.shape[1] % LANES
        self._planes, self._bins = planes, bins
        self._labels = np.full((len(labels), labels.shape[1] + more), VOID, np.uint8)
        self._labels[:, : labels.shape[1]] = labels
        rows, columns = map(axis, planes.shape[1:], labels.shape)
        self._rows, self._columns = rows, columns.longer(more)

    def __call__(self, rows: slice) -> Counts:
        num_classes, bins = len(self._planes), self._bins
        confusion = np.zeros(num_classes * (num_classes + 1), np.int64)
        hits, tops = np.zeros((num_classes + 1) * bins, np.int64), np.zeros((3 * bins, 2), np.int64)
        counts = Counts.zeros(num_classes, bins)
        sums = np.zeros(2, np.int64)
        count_rows(
            self._planes, self._labels[rows], *self._rows.part(rows), *self._columns,
            confusion, hits, tops, counts.class_bins, sums,
        )  # fmt: skip
        counts.confusion[:] = confusion.reshape(-1, num_classes)[:-1]
        counts.class_bins[:, 0, 0] += counts.confusion.sum()
        counts.class_bins[:, :, 1] = hits.reshape(-1, bins)[:-1]
        wrong, right, _ = tops.reshape(3, bins, 2)
        counts.top1_bins[:, 0], counts.top1_bins[:, 1] = wrong[:, 0] + right[:, 0], right[:, 0]
        counts.top1_bins[:, 2] = wrong[:, 1] + right[:, 1]
        return replace(counts, brier=sums[0], nll=sums[1])


def of_whole_image(labels: Bytes, num_classes: int, bins: int) -> Counts:
    """What its label map alone says of an image: one image, and how many of its pixels have a label
    and how many are void. All other counts are 0."""
    void = np.count_nonzero(labels == VOID)
    numbers = {"pixels": labels.size - void, "void": void, "images": 1}
    plain = {name: np.array(number, np.int64) for name, number in numbers.items()}
    return replace(Counts.zeros(num_classes, bins), **plain)
