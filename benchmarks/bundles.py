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
ROUNDS = 2  # a step of 16 cells lasts most of a minute, and so do the peers beside it
GROWTH = (1, 2, 4, 8, 16, 32)


def measure() -> list[Comparison]:
    """Both models, each in a process of its own, whose peak memory is its own too."""
    found = []
    for model in TARGETS:
        found += in_own_process(_of_model, model)
    return found


def bundle_growth() -> dict[int, tuple[float, ...]]:
    """Seconds of one step of a bundle, in three rounds, by its number of cells: FCN, batch 2, at
    160 x 160. Of no cell it is the backbone's alone."""
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
        job.step(many)  # warms up, and is the step whose memory counts
        more = {"peak_gb_of_one_cell": peak_of_one, "peak_gb_of_bundle": _peak_gb()}
        limit = _limit(one, job)
        peer = published(job)
        peer()
        rounds = [_round(job, many[i::ROUNDS], many, peer) for i in range(ROUNDS)]
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
    job: Job, alone: Sequence[CellTrainer], many: Sequence[CellTrainer], peer: Work
) -> dict[str, float]:
    """Seconds a cell: of a step of the bundle `many`, and of the peers' on both sides of it."""
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
    return arithmetic(flops, matrix_rate())


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


def _protocol(side: int = SIDE) -> Protocol:
    return Protocol(weights="none", batch_size=BATCH, crop=(side, side), threads=2)


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
