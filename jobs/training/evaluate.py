"""Evaluate every cell of a bundle on the validation shards, one image for each forward pass.

Rank i mod world_size evaluates image i. No image is padded or repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from data_prep.settings import VOID
from data_prep.shards.reader import SplitReader
from hpc.distributed.process_group import Group
from jobs.data.batches import EvaluationImages
from jobs.data.loader import load_images
from jobs.kernels.fused_counts import count_upsampled
from jobs.metrics.counts import Counts
from jobs.metrics.reference import count_image
from jobs.models.build import normalise, upsample
from jobs.spec.protocol import Protocol

Forward = Callable[[Tensor], list[Tensor]]
Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def evaluate(
    forward: Forward,
    num_cells: int,
    reader: SplitReader,
    num_classes: int,
    protocol: Protocol,
    group: Group,
    stop: Callable[[], bool],
    fetch: Callable[[Iterator[Pair]], Pair | None] = lambda images: next(images, None),
) -> list[Counts | None] | None:
    """Return the counts of each cell over all images and ranks, or None on a stop.

    The counts of a cell are None if its logits are not all finite.

    Args:
        forward: normalised images [1, 3, H, W] -> logits [1, C, h, w] of each cell, at any stride.
        num_cells: number of cells.
        reader: the validation split.
        num_classes: C.
        protocol: sizes, bins and `counting`.
        group: the ranks, which must all call this together.
        stop: called after each image is fetched; if it is true on one rank, all ranks stop.
        fetch: returns the next image, or None at the end.
    """
    if num_cells == 0:
        return []
    counts = [Counts.zeros(num_classes, protocol.bins) for _ in range(num_cells)]
    broken = [False] * num_cells
    mine = range(group.rank, len(reader), group.world_size)
    loaded = load_images(EvaluationImages(reader, protocol), mine, protocol.workers)
    # close on errors too: a traceback would keep the loader processes alive
    with closing(loaded) as images:
        for _ in range(0, len(reader), group.world_size):
            pair = fetch(images)
            if group.max(stop()):
                return None
            if pair is None:  # in the last round some ranks may have no image
                continue
            image, target = pair
            logits = forward(normalise(image[None].to(group.device, non_blocking=True)))
            for cell, output in enumerate(logits):
                broken[cell] |= not bool(torch.isfinite(output).all())
                if not broken[cell]:
                    counts[cell] += count(output[0], target, protocol)
    agreed = [bool(group.max(b)) for b in broken]
    return [None if b else _sum_over_ranks(c, group) for b, c in zip(agreed, counts, strict=True)]


def count(logits: Tensor, target: Tensor, protocol: Protocol) -> Counts:
    """Return the counts of one image, by the protocol's `counting`.

    Args:
        logits: [C, h, w] at any stride.
        target: uint8 [H, W].

    Raises:
        ValueError: the logits or labels cannot be counted.
    """
    if protocol.counting == "fused":
        return count_upsampled(logits, target, protocol.bins, protocol.threads)
    scores = upsample(logits[None].float(), (target.shape[0], target.shape[1]))[0]
    return count_image(scores, target.to(logits.device), protocol.bins, VOID)


def _sum_over_ranks(counts: Counts, group: Group) -> Counts:
    arrays = counts.as_arrays()
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays.values()]))
    summed = group.sum(flat).numpy()
    parts = np.split(summed, np.cumsum([array.size for array in arrays.values()])[:-1])
    shaped = zip(arrays.items(), parts, strict=True)
    return Counts.from_arrays({name: part.reshape(array.shape) for (name, array), part in shaped})


def stack(counts: Sequence[Counts]) -> dict[str, np.ndarray]:
    """Stack the arrays of several cells along a new first axis, as a counts file has them."""
    arrays = [c.as_arrays() for c in counts]
    return {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
