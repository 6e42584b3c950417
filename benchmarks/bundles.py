"""One training step of a cell at full size, ResNet-101 at 480 x 480 and batch 2, in a bundle of 16
cells: features and steps as `jobs.train` takes them, with random weights. Against it

* the published way: one run a model, the backbone in train mode, a backward pass through all of the
  network, an optimiser that holds the head only (torchvision's model, torch's cross entropy);
* the frozen backbone with one cell a run, ours too.

Seconds are per cell. The cells are the 16 losses of the paper's table. The frozen peer takes each
once: half of them in a round, as many before the bundle's step as behind it. The published way
takes the plain cross entropy, the cheapest, before and behind. All run in one process, so the peers
have our allocator's settings too.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import mean
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import segmentation

from benchmarks.measure import Comparison, Work, matrix_rate
from hpc.env import RankEnv
from hpc.groups import Group, process_group
from jobs.batches import Batch
from jobs.cell import Cell
from jobs.losses.names import parse_loss
from jobs.models import dilated
from jobs.models.build import Backbone, Features, build_backbone
from jobs.protocol import Protocol
from jobs.train import configure_torch, features
from jobs.trainee import Trainee, step_in_turn

LOSSES = (
    "WCE", "WDL", "FL", "CEMP", "DLCE", "WDLCE", "DLWCE", "WDLWCE", "DLNCE", "DLACE", "WDLNCE",
    "WDLACE", "DLNWCE", "DLAWCE", "WDLNWCE", "WDLAWCE",
)  # fmt: skip
TARGETS = {"fcn_resnet101": (7.0, 2.5), "deeplabv3_resnet101": (5.0, 2.0)}
CLASSES, BATCH, SIDE, GROWTH_SIDE = 21, 2, 480, 160
ROUNDS = 2  # a step of 16 cells lasts most of a minute, and so do the peers beside it
GROWTH = (1, 2, 4, 8, 16, 32)


class Job:
    """What `jobs.train` holds of a bundle, without a data set: a backbone, cells, one batch."""

    def __init__(self, model: str, group: Group, side: int) -> None:
        self.model, self.group = model, group
        self.backbone: Backbone = build_backbone("resnet101", 0, 0.1)
        self.backbone.eval().requires_grad_(False)
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(256, (BATCH, 3, side, side), generator=draw, dtype=torch.uint8)
        self.target = torch.randint(CLASSES, (BATCH, side, side), generator=draw)
        self.batch = Batch(images, self.target.to(torch.uint8), range(BATCH))

    def cells(self, losses: Sequence[str]) -> list[Trainee]:
        """New trainees, one a loss."""
        return [
            Trainee(_cell(self.model, loss), CLASSES, np.ones(CLASSES), self.group)
            for loss in losses
        ]

    def pass_backbone(self) -> Features:
        """What all cells of a bundle share."""
        return features(self.backbone, self.batch.images, _cell(self.model, "CE"), self.group)

    def step(self, trainees: Sequence[Trainee]) -> None:
        """One step of a bundle of `trainees`, in the middle of their training."""
        inputs = self.pass_backbone()
        step_in_turn(trainees, inputs, self.batch, self.target, 50, 100)


def measure() -> list[Comparison]:
    """Both models, each in a process of its own, whose peak memory is its own too."""
    found = []
    for model in TARGETS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found += process.submit(_of_model, model).result()
    return found


def bundle_growth() -> dict[int, tuple[float, ...]]:
    """Seconds of one step of a bundle, in three rounds, by its number of cells: FCN, batch 2, at
    160 x 160. Of no cell it is the backbone's alone."""
    with tempfile.TemporaryDirectory() as folder, _group(Path(folder)) as group:
        job = Job("fcn_resnet101", group, GROWTH_SIDE)
        trainees = job.cells([LOSSES[i % len(LOSSES)] for i in range(max(GROWTH))])
        job.step(trainees)
        ways = {0: job.pass_backbone, **{k: partial(job.step, trainees[:k]) for k in GROWTH}}
        rounds = [{k: _seconds(work) for k, work in ways.items()} for _ in range(3)]
    return {k: tuple(seconds[k] for seconds in rounds) for k in ways}


def _of_model(model: str) -> list[Comparison]:
    with tempfile.TemporaryDirectory() as folder, _group(Path(folder)) as group:
        job = Job(model, group, SIDE)
        one = job.cells(["CE"])
        job.step(one)
        peak_of_one = _peak_gb()
        many = job.cells(LOSSES)
        job.step(many)  # warms up, and is the step whose memory counts
        more = {"peak_gb_of_one_cell": peak_of_one, "peak_gb_of_bundle": _peak_gb()}
        limit = _limit(one, job)
        published = _published(model, job)
        published()
        rounds = [_round(job, many[i::ROUNDS], many, published) for i in range(ROUNDS)]
    peers = ("published", "the published way, a run a cell"), ("alone", "frozen, one cell a run")
    return [
        Comparison(
            f"a step of a cell in a bundle of 16, {model}", against,
            tuple(seconds["ours"] for seconds in rounds),
            tuple(seconds[name] for seconds in rounds), target, limit, more,
        )
        for (name, against), target in zip(peers, TARGETS[model], strict=True)
    ]  # fmt: skip


def _round(
    job: Job, alone: Sequence[Trainee], many: Sequence[Trainee], published: Work
) -> dict[str, float]:
    """Seconds a cell: of a step of the bundle `many`, and of the peers' on both sides of it."""
    half = len(alone) // 2
    steps = [partial(job.step, [cell]) for cell in alone]
    before = [_seconds(work) for work in steps[:half]], _seconds(published)
    ours = _seconds(partial(job.step, many)) / len(many)
    behind = [_seconds(work) for work in steps[half:]], _seconds(published)
    return {
        "ours": ours,
        "alone": mean(before[0] + behind[0]),
        "published": mean([before[1], behind[1]]),
    }


def _published(model: str, job: Job) -> Work:
    """A step as the published code takes it."""
    network: nn.Module = getattr(segmentation, model)(
        weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=False
    )
    network.train()
    optimizer = torch.optim.SGD(
        network.classifier.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4
    )
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    images: Tensor = job.batch.images.float() / 255

    def step() -> None:
        optimizer.zero_grad()
        criterion(network(images)["out"], job.target).backward()
        optimizer.step()

    return step


def _limit(one: Sequence[Trainee], job: Job) -> str:
    """The arithmetic of a cell's step, the backbone's 16th part and its head's, at the rate of a
    matrix product. The products of a dilated kernel with padding are left out."""
    with FlopCounterMode(display=False) as counter:
        inputs = job.pass_backbone()
    backbone = counter.get_total_flops()
    with mock.patch.object(dilated, "LARGE", math.inf), FlopCounterMode(display=False) as alone:
        job.step(one)
    assert isinstance(inputs, Tensor)
    flops = alone.get_total_flops() - _with_padding(one[0].head, inputs)
    flops += backbone / len(LOSSES) - backbone
    rate = matrix_rate()
    return f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s: {flops / rate:.2g} s"


def _with_padding(head: nn.Module, inputs: Tensor) -> int:
    """Floating-point operations of a head's step whose factor is padding of a dilated convolution,
    forward and in the gradient of its kernel."""
    images, channels, *sides = inputs.shape
    found = 0
    for layer in head.modules():
        if isinstance(layer, dilated.DilatedConv2d):
            within = math.prod(n + 2 * max(n - layer.dilation[0], 0) for n in sides)
            outside = 9 * math.prod(sides) - within
            found += 2 * 2 * images * channels * layer.out_channels * outside
    return found


def _cell(model: str, loss: str) -> Cell:
    protocol = Protocol(weights="none", batch_size=BATCH, threads=2)
    return Cell(
        dataset="random", data="0" * 16, model=model, loss=parse_loss(loss), seed=0,
        protocol=protocol,
    )  # fmt: skip


def _group(folder: Path) -> AbstractContextManager[Group]:
    configure_torch(Protocol(threads=2))
    return process_group(RankEnv("single", 0, 1, 0, node="", job_id="", start_id=""), folder)


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
