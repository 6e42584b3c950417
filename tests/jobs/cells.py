"""Cells, and batches of features to train them on without a data set."""

from __future__ import annotations

import numpy as np
import torch

from data_prep.settings import VOID
from jobs.data.batches import Batch, share
from jobs.losses.grammar import parse_loss
from jobs.spec.cell import Cell
from jobs.spec.protocol import Protocol

MODEL = "fcn_mobilenet_v3_large"
CLASS_WEIGHTS = np.array([0.3, 1.7, 1.0])


def a_cell(loss="WCE", model=MODEL, seed=0, **protocol):
    return Cell(
        dataset="streets",
        data="0123456789abcdef",
        model=model,
        loss=parse_loss(loss),
        seed=seed,
        protocol=Protocol(**{"weights": "none", **protocol}),
    )


FEATURES, IMAGES = (960, 3, 4), (3, 24, 32)  # of a mobile backbone, and its inputs


def a_share(step, rank=0, world_size=1, images=5, void=(), size=FEATURES):
    """A rank's inputs, batch and target at a step: features, or images, and label maps of 3
    classes. The images at the places `void` have no label."""
    generator = torch.Generator().manual_seed(step)
    whole = torch.randn(images, *size, generator=generator, dtype=torch.float64).relu()
    target = torch.randint(3, (images, 24, 32), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = VOID
    for image in void:
        target[image] = VOID
    places = share(images, rank, world_size)
    mine = slice(places.start, places.stop)
    nothing = torch.zeros(len(places), 3, 24, 32, dtype=torch.uint8)
    inputs = whole[mine].to(torch.get_default_dtype())
    return inputs, Batch(nothing, target[mine].to(torch.uint8), places), target[mine]
