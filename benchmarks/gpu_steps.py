"""Measure training steps on a GPU: ResNet-101 at 480 x 480, batch 12, bundles of 1, 8 and 32 cells.

Ours runs in each half precision that the GPU supports. The peers are

* the published way (see `benchmarks.bundle_job`), in float32 and in the same half precision;
  torch's float32 convolutions use TF32 if the GPU has it;
* the frozen backbone with one cell in each run, also ours.

Seconds are per cell. The batch lies on the GPU; `benchmarks.full_size` measures whole jobs with
their loaders. The limit is the arithmetic of a cell's head and its share of the backbone, at the
rate of a matrix product. Further rows measure single settings in a bundle of 8. Each kind runs in a
new process; if it fails, its row gives the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bundle_job import LOSSES, Job, published, ready
from benchmarks.gpu import NO_GPU, in_own_process, in_short, peak_gb
from benchmarks.measure import (
    Comparison,
    NotMeasured,
    Result,
    Work,
    arithmetic,
    matrix_rate,
    synchronised,
    time_in_turns,
)
from hpc.distributed.process_group import Group
from jobs.models import memory_format, resize
from jobs.spec.protocol import Protocol
from jobs.training.cell_trainer import CellTrainer, half_precision

MODELS = ("fcn_resnet101", "deeplabv3_resnet101")
CELLS = (1, 8, 32)
IN_SETTINGS = 8
ROUNDS = 5
Block = Callable[[], AbstractContextManager[object]]
AS_PUBLISHED, ALONE = "the published way, float32", "frozen, one cell a run"


def measure() -> Iterator[Result]:
    """Measure all models in all precisions, then the settings."""
    if not torch.cuda.is_available():
        yield NotMeasured("a training step on a GPU", AS_PUBLISHED, NO_GPU)
        return
    fixed = {"weights": "none", "batch_size": 12, "threads": os.cpu_count() or 1}
    protocols = [
        Protocol.model_validate({**fixed, "precision": p}) for p in in_own_process(_precisions)
    ]
    for protocol in protocols:
        for model in MODELS:
            yield from _or_why(of_bundles, model, protocol, CELLS)
    for names in SETTINGS:
        for model in MODELS:
            yield from _or_why(of_settings, model, protocols[0], IN_SETTINGS, (names,))


class Measured(NamedTuple):
    """Measurements of bundles of several sizes.

    `seconds` are by size or by a peer's name, `peaks` in GB and `limits` by size. `absent` gives
    the reason for each peer that was not measured.
    """

    seconds: dict[str, tuple[float, ...]]
    peaks: dict[int, float]
    limits: dict[int, str]
    absent: dict[str, str]


def of_bundles(model: str, protocol: Protocol, sizes: Sequence[int]) -> list[Result]:
    """Compare bundles of `sizes` cells, in rising order, with the published way.

    If 1 is one of the sizes, they are also compared with one cell in each run.
    """
    with ready(protocol) as group:
        found = _measured(model, protocol, sizes, group)
    rows: list[Result] = []
    for size in sizes:
        what = f"a step of a cell in a bundle of {size}, {model}, {protocol.precision}"
        whole = found.seconds[str(size)]
        more: dict[str, float | str] = {"steps a second": round(1 / median(whole), 3)}
        if size in found.peaks:
            more["peak GB"] = found.peaks[size]
        peers = {k: s for k, s in found.seconds.items() if not k.isdigit()}
        if size > 1 and 1 in sizes:
            peers[ALONE] = found.seconds["1"]
        ours = tuple(s / size for s in whole)
        rows += [
            Comparison(what, name, ours, theirs, 0.0, found.limits[size], more)
            for name, theirs in peers.items()
        ]
        rows += [NotMeasured(what, name, why) for name, why in found.absent.items()]
    return rows


def _measured(model: str, protocol: Protocol, sizes: Sequence[int], group: Group) -> Measured:
    # Return numbers only: trainers must be freed before their process group.
    job, half = Job(model, group, protocol), half_precision(protocol, group)
    trainers: list[CellTrainer] = []
    ways: dict[str, Work] = {}
    peaks = {}
    for size in sizes:
        trainers += job.cells([LOSSES[i % len(LOSSES)] for i in range(len(trainers), size)])
        ways[str(size)] = synchronised(partial(job.step, trainers[:size]), group.device)
        if group.device.type == "cuda":
            peaks[size] = peak_gb(ways[str(size)], group.device)
    limits = {size: _limit(job, trainers, size) for size in sizes}
    peers = {AS_PUBLISHED: None, f"the published way, {protocol.precision}": half}
    absent = {}
    for name, dtype in peers.items():
        try:
            peer = synchronised(published(job, dtype), group.device)
            peer()
        except torch.OutOfMemoryError as error:
            absent[name] = in_short(error)
        else:
            ways.setdefault(name, peer)
    return Measured(time_in_turns(ways, ROUNDS), peaks, limits, absent)


def _limit(job: Job, trainers: Sequence[CellTrainer], size: int) -> str:
    with FlopCounterMode(display=False) as shared:
        job.pass_backbone()
    with FlopCounterMode(display=False) as whole:
        job.step(trainers[:1])
    backbone = shared.get_total_flops()
    flops = whole.get_total_flops() - backbone + backbone / size
    half = half_precision(job.protocol, job.group)
    return arithmetic(flops, matrix_rate(half or torch.float32, job.group.device))


def of_settings(
    model: str, protocol: Protocol, size: int, names: Sequence[str]
) -> list[Comparison]:
    """Compare a bundle of `size` cells with the same under each named setting of `SETTINGS`.

    All have the workspace that deterministic matrix products need.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
    with ready(protocol) as group:
        ways = {"": _steps(model, group, protocol, size)}
        for name in names:
            ways[name] = _steps(model, group, protocol, size, SETTINGS[name])
        names_and_seconds = time_in_turns(ways, ROUNDS)
        ways.clear()  # trainers must be freed before their process group
    seconds = {name: tuple(s / size for s in each) for name, each in names_and_seconds.items()}
    what = f"a step of a cell in a bundle of {size}, {model}, {protocol.precision}, as it is"
    return [Comparison(what, name, seconds[""], seconds[name]) for name in names]


def _steps(
    model: str, group: Group, protocol: Protocol, size: int, within: Block = nullcontext
) -> Work:
    """Return the step of a bundle that is built and run inside the context `within`."""
    with within():
        job = Job(model, group, protocol)
        trainers = job.cells([LOSSES[i % len(LOSSES)] for i in range(size)])

    def step() -> None:
        with within():
            job.step(trainers)

    return synchronised(step, group.device)


def _torchs_upsampling() -> AbstractContextManager[object]:
    return mock.patch.object(resize, "by_products", lambda device: False)


def _channels_apart() -> AbstractContextManager[object]:
    return mock.patch.object(memory_format, "memory_format", lambda *_: torch.contiguous_format)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Block] = {
    "channels apart (NCHW)": _channels_apart,
    "torch's gradient of upsampling": _torchs_upsampling,
    "deterministic algorithms": _deterministic,
}


def _precisions() -> list[str]:
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return ["mixed", "bf16"] if has_bf16 else ["mixed"]


def _or_why(
    work: Callable[..., Sequence[Result]], model: str, protocol: Protocol, *arguments: object
) -> Sequence[Result]:
    """Return the comparisons of `work` in a new process, or the reason for its failure."""
    try:
        return in_own_process(work, model, protocol, *arguments)
    except Exception as error:  # torch and the driver raise errors of many types
        what = f"{work.__name__} {' '.join(map(str, arguments))}, {model}, {protocol.precision}"
        return [NotMeasured(what, AS_PUBLISHED, in_short(error))]
