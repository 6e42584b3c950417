"""Count one image in a single pass over its logits at any stride.

The pass upsamples, takes the softmax, predicts and counts row by row, so it stores nothing of the
image's size. The counts equal those of the reference, `upsample` and
`jobs.metrics.reference.count_image`, up to rounding. Only a pixel whose scores are a few units in
the last place from a tie or from the edge of a bin may get another prediction or bin. The pass runs
on the CPU, for logits of any device.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data_prep.settings import VOID
from jobs.kernels.count_kernel import MOST_COLUMNS, MOST_ROWS, Bytes, Reals, count_tile
from jobs.metrics.counts import Counts

_FEWEST_ROWS = 32  # fewer do not repay the start of a thread


@torch.no_grad()
def count_upsampled(logits: Tensor, target: Tensor, bins: int, threads: int = 1) -> Counts:
    """Return the counts of one image, with the same bits for any number of threads.

    Args:
        logits: [C, h, w] at any stride, taken as float32.
        target: label map uint8 [H, W] of labels below C or void.
        bins: number of bins of the calibration histograms.
        threads: number of threads to count with.

    Raises:
        ValueError: for wrong shapes or types, a label that is no class, and logits that are not all
            finite.
    """
    _check_shapes(logits, target, bins)
    planes = logits.float().cpu().contiguous().numpy()
    labels = target.cpu().contiguous().numpy()
    _check_values(planes, labels)
    source_positions = tuple(map(positions, planes.shape[1:], labels.shape))
    count = partial(_count_tile, planes, labels, source_positions, bins)
    tiles = _tiles(labels.shape, threads)
    with ThreadPoolExecutor(threads) as pool:
        found = list((pool.map if threads > 1 else map)(count, tiles))
    counts = sum(found, Counts.zeros(len(planes), bins))
    void = np.count_nonzero(labels == VOID)
    counts.class_bins[:, 0, 0] -= void  # the kernel counts void pixels as scores of 0
    pixels, void, images = np.array([labels.size - void, void, 1])
    return replace(counts, pixels=pixels, void=void, images=images)


def positions(places: int, pixels: int) -> Reals:
    """Return where `pixels` lie among `places` along one axis: float32 from 0 to places - 1.

    Bilinear interpolation with `align_corners=False` places them so: scale * (x + 1/2) - 1/2,
    rounded once, as PyTorch does on GPUs and on CPUs with fused multiply-add.
    """
    scale = np.float64(np.float32(places) / np.float32(pixels))
    exact = scale * (np.arange(pixels) + 0.5) - 0.5  # in float64 without rounding
    return exact.astype(np.float32).clip(np.float32(0), np.float32(places - 1))


def _check_shapes(logits: Tensor, target: Tensor, bins: int) -> None:
    if logits.ndim != 3 or target.ndim != 2 or target.dtype != torch.uint8:
        raise ValueError(
            f"logits must be [C, h, w] and target uint8 [H, W], not {list(logits.shape)} and "
            f"{list(target.shape)} of {target.dtype}"
        )
    if bins < 1 or 0 in logits.shape or len(logits) > VOID:
        raise ValueError(
            f"counts need 1 to {VOID} classes and a bin, not {list(logits.shape)} and {bins}"
        )


def _check_values(planes: Reals, labels: Bytes) -> None:
    # numpy, because torch's threads would spin beside ours; both are nan if one value is
    if not (math.isfinite(planes.min()) and math.isfinite(planes.max())):
        raise ValueError("logits contain nan or infinity, so they give no scores")
    highest = int((labels + np.uint8(1)).max(initial=0)) - 1  # void + 1 is 0 in uint8
    if highest >= len(planes):
        raise ValueError(
            f"label {highest} is neither one of {len(planes)} classes nor void ({VOID})"
        )


def _tiles(size: tuple[int, ...], threads: int) -> list[tuple[slice, slice]]:
    """Return the tiles of an image: a band of rows for each thread, within the kernel's limits."""
    height, width = size
    bands = max(1, math.ceil(height / MOST_ROWS), min(threads, height // _FEWEST_ROWS))
    rows, columns = _split(height, bands), _split(width, math.ceil(width / MOST_COLUMNS))
    return [(band, part) for band in rows for part in columns]


def _split(length: int, parts: int) -> list[slice]:
    return [slice(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


def _count_tile(
    planes: Reals, labels: Bytes, source_positions: tuple[Reals, ...], bins: int,
    tile: tuple[slice, slice],
) -> Counts:  # fmt: skip
    rows, columns = (axis[part] for axis, part in zip(source_positions, tile, strict=True))
    counts, sums = Counts.zeros(len(planes), bins), np.zeros(2, np.int64)
    count_tile(
        planes, np.ascontiguousarray(labels[tile]), rows, columns,
        counts.confusion, counts.class_bins, counts.top1_bins, sums,
    )  # fmt: skip
    return replace(counts, brier=sums[0], nll=sums[1])
