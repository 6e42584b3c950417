"""Measure a training step in a bundle of 16 cells: ResNet-101, 480 x 480, batch 2.

The cells are the 16 losses of the paper's table, with random weights. The peers are

* the published way: one run for each model, the backbone in train mode, a backward pass through the
  whole network, an optimiser that holds the head only (torchvision's model, torch's cross entropy);
* the frozen backbone with one cell in each run, also ours.

Seconds are per cell. In each round the frozen peer trains half of the losses, as many before the
bundle's step as after it. The published way trains the plain cross entropy, the cheapest loss,
before and after. All run in one process, so the peers also have our allocator settings.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from functools import partial
from statistics import mean
from unittest import mock

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bundle_job import LOSSES, Job, published, ready
from benchmarks.gpu import in_own_process
from benchmarks.measure import Comparison, Work, arithmetic, matrix_rate
from jobs.models import dilated
from jobs.spec.protocol import Protocol
from jobs.training.cell_trainer import CellTrainer

TARGETS = {"fcn_resnet101": (7.0, 2.5), "deeplabv3_resnet101": (5.0, 2.0)}
BATCH, SIDE, GROWTH_SIDE = 2, 480, 160
ROUNDS = 2  # a step of 16 cells and its peers take most of a minute each
GROWTH = (1, 2, 4, 8, 16, 32)


def measure() -> list[Comparison]:
    """Compare both models, each in its own process, so that each has its own peak memory."""
    found = []
    for model in TARGETS:
        found += in_own_process(_of_model, model)
    return found


def bundle_growth() -> dict[int, tuple[float, ...]]:
    """Return the seconds of a bundle's step in three rounds, by the number of cells.

    The model is FCN with batch 2 at 160 x 160. With 0 cells the backbone runs alone.
    """
    protocol = _protocol(GROWTH_SIDE)
    with ready(protocol) as group:
        job = Job("fcn_resnet101", group, protocol)
        trainers = job.cells([LOSSES[i % len(LOSSES)] for i in range(max(GROWTH))])
        job.step(trainers)
        ways = {0: job.pass_backbone, **{k: partial(job.step, trainers[:k]) for k in GROWTH}}
        rounds = [{k: _seconds(work) for k, work in ways.items()} for _ in range(3)]
    return {k: tuple(seconds[k] for seconds in rounds) for k in ways}


def _of_model(model: str) -> list[Comparison]:
    protocol = _protocol()
    with ready(protocol) as group:
        job = Job(model, group, protocol)
        one = job.cells(["CE"])
        job.step(one)
        peak_of_one = _peak_gb()
        many = job.cells(LOSSES)
        job.step(many)  # warms up; its peak memory is recorded
        more = {"peak_gb_of_one_cell": peak_of_one, "peak_gb_of_bundle": _peak_gb()}
        limit = _limit(one, job)
        peer = published(job)
        peer()
        rounds = [_round(job, many[i::ROUNDS], many, peer) for i in range(ROUNDS)]
    peers = (
        ("published", "the published way, one run per cell"),
        ("alone", "frozen, one run per cell"),
    )
    return [
        Comparison(
            f"a step of a cell in a bundle of 16, {model}", against,
            tuple(seconds["ours"] for seconds in rounds),
            tuple(seconds[name] for seconds in rounds), target, limit, more,
        )
        for (name, against), target in zip(peers, TARGETS[model], strict=True)
    ]  # fmt: skip


def _round(
    job: Job, alone: Sequence[CellTrainer], many: Sequence[CellTrainer], peer: Work
) -> dict[str, float]:
    """Return seconds per cell of the bundle `many`, and of the peers before and after it."""
    half = len(alone) // 2
    steps = [partial(job.step, [cell]) for cell in alone]
    before = [_seconds(work) for work in steps[:half]], _seconds(peer)
    ours = _seconds(partial(job.step, many)) / len(many)
    behind = [_seconds(work) for work in steps[half:]], _seconds(peer)
    return {
        "ours": ours,
        "alone": mean(before[0] + behind[0]),
        "published": mean([before[1], behind[1]]),
    }


def _limit(one: Sequence[CellTrainer], job: Job) -> str:
    """Return the time of a cell's arithmetic at the rate of a matrix product.

    It is a 16th of the backbone and the whole head, without products of padding.
    """
    with FlopCounterMode(display=False) as counter:
        inputs = job.pass_backbone()
    backbone = counter.get_total_flops()
    with mock.patch.object(dilated, "LARGE", math.inf), FlopCounterMode(display=False) as alone:
        job.step(one)
    assert isinstance(inputs, Tensor)
    flops = alone.get_total_flops() - _with_padding(one[0].head, inputs)
    flops += backbone / len(LOSSES) - backbone
    return arithmetic(flops, matrix_rate())


def _with_padding(head: nn.Module, inputs: Tensor) -> int:
    """Return the floating-point operations on padding of dilated convolutions in a head's step.

    They occur in the forward pass and in the gradient of the kernel.
    """
    images, channels, *sides = inputs.shape
    found = 0
    for layer in head.modules():
        if isinstance(layer, dilated.DilatedConv2d):
            within = math.prod(n + 2 * max(n - layer.dilation[0], 0) for n in sides)
            outside = 9 * math.prod(sides) - within
            found += 2 * 2 * images * channels * layer.out_channels * outside
    return found


def _protocol(side: int = SIDE) -> Protocol:
    return Protocol(weights="none", batch_size=BATCH, crop=(side, side), threads=2)


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
