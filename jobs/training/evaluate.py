"""Counts of every cell of a bundle over the validation shards: one image a forward pass, image i on
rank i mod world_size, none padded or repeated."""

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
    """The counts of each cell over all images and ranks; None for a cell whose logits are not all
    finite, and None altogether if a stop was asked for.

    forward: normalised images [1, 3, H, W] -> one logits [1, C, h, w] a cell, at any stride.
    stop: asked once an image; all ranks leave together. fetch: takes the next image, before.
    """
    if num_cells == 0:
        return []
    counts = [Counts.zeros(num_classes, protocol.bins) for _ in range(num_cells)]
    broken = [False] * num_cells
    mine = range(group.rank, len(reader), group.world_size)
    loaded = load_images(EvaluationImages(reader, protocol), mine, protocol.workers)
    # closed on an error too, whose traceback would keep the loader processes alive
    with closing(loaded) as images:
        for _ in range(0, len(reader), group.world_size):
            pair = fetch(images)
            if group.max(stop()):
                return None
            if pair is None:  # the last round may leave some ranks without an image
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
    """Counts of one image from its logits [C, h, w] and label map uint8 [H, W], as the protocol's
    `counting` says. Raises `ValueError` for what cannot be counted."""
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
    """The arrays of several cells with a new first axis, as the counts file has them."""
    arrays = [c.as_arrays() for c in counts]
    return {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}
