"""Training steps on a GPU: ResNet-101 at 480 x 480, batch 12, in bundles of 1, 8 and 32 cells, in
each half precision that the GPU has, against

* the published way, one run a model (see `benchmarks.bundle_job`), in float32, as its code does,
  and in the same half precision;
* one cell a run with the frozen backbone, ours too.

Seconds are of one cell. The batch lies on the GPU already: `benchmarks.full_size` has whole jobs
with their loaders. The limit is the arithmetic of a cell's head and its share of the backbone, at
the rate of a matrix product. Then what single settings cost or bring, in a bundle of 8.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import median
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bundle_job import LOSSES, Job, published, ready
from benchmarks.gpu import NO_GPU, matrix_rate, peak_gb, waited
from benchmarks.measure import Absent, Comparison, Found, Work, in_turns, time_text
from hpc.groups import Group
from jobs.compiled_network import require_compiler
from jobs.models import layout
from jobs.protocol import Protocol
from jobs.trainee import Trainee, half_precision

MODELS = ("fcn_resnet101", "deeplabv3_resnet101")
CELLS = (1, 8, 32)
IN_SETTINGS = 8
ROUNDS = 5
Block = Callable[[], AbstractContextManager[object]]
AS_PUBLISHED, ALONE = "the published way, float32", "frozen, one cell a run"


def measure() -> list[Found]:
    """All models in all precisions, each in a process of its own."""
    if not torch.cuda.is_available():
        return [Absent("a training step on a GPU", AS_PUBLISHED, NO_GPU)]
    found: list[Found] = []
    for precision in _precisions():
        protocol = Protocol.model_validate(
            {"weights": "none", "batch_size": 12, "precision": precision}
        )
        for model in MODELS:
            found += _in_own_process(of_bundles, model, protocol, CELLS)
            found += _in_own_process(of_settings, model, protocol, IN_SETTINGS)
    return found


def of_bundles(model: str, protocol: Protocol, sizes: Sequence[int]) -> list[Comparison]:
    """Bundles of so many cells against the published way and, where it is one of them, against
    one cell."""
    with ready(protocol) as group:
        job, half = Job(model, group, protocol), half_precision(protocol, group)
        trainees = job.cells([LOSSES[i % len(LOSSES)] for i in range(max(sizes))])
        steps = {size: partial(job.step, trainees[:size]) for size in sizes}
        peaks = {size: peak_gb(step, group.device) for size, step in steps.items()}
        limits = {size: _limit(job, trainees, size) for size in sizes}
        peers = {AS_PUBLISHED: published(job)}
        if half is not None:
            peers[f"the published way, {protocol.precision}"] = published(job, half)
        ways: dict[str, Work] = {**{str(size): step for size, step in steps.items()}, **peers}
        seconds = in_turns({k: waited(work, group.device) for k, work in ways.items()}, ROUNDS)
    found = []
    for size in sizes:
        ours = tuple(s / size for s in seconds[str(size)])
        more = {
            "steps a second": round(1 / median(seconds[str(size)]), 3),
            "peak GB": peaks[size],
        }
        against = {name: seconds[name] for name in peers}
        if 1 in sizes and size > 1:
            against[ALONE] = seconds["1"]
        what = f"a step of a cell in a bundle of {size}, {model}, {protocol.precision}"
        found += [
            Comparison(what, name, ours, theirs, 0.0, limits[size], more)
            for name, theirs in against.items()
        ]
    return found


def of_settings(model: str, protocol: Protocol, size: int) -> list[Comparison]:
    """A bundle of `size` cells as it is against the same with each of `SETTINGS` changed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks once, at its start
    with ready(protocol) as group:
        ways = {"": _steps(model, group, protocol, size)}
        for name, (update, within) in SETTINGS.items():
            changed = protocol.model_copy(update=update)
            ways[name] = _steps(model, group, changed, size, within)
        names = {name: waited(work, group.device) for name, work in ways.items()}
        seconds = {
            name: tuple(s / size for s in each) for name, each in in_turns(names, ROUNDS).items()
        }
    what = f"a step of a cell in a bundle of {size}, {model}, {protocol.precision}, as it is"
    return [Comparison(what, name, seconds[""], seconds[name]) for name in SETTINGS]


def _steps(
    model: str, group: Group, protocol: Protocol, size: int, within: Block = nullcontext
) -> Work:
    """The step of a bundle that was built, and is run, within a block."""
    with within():
        require_compiler(protocol, group.device)
        job = Job(model, group, protocol)
        trainees = job.cells([LOSSES[i % len(LOSSES)] for i in range(size)])

    def step() -> None:
        with within():
            job.step(trainees)

    return step


def _channels_apart() -> AbstractContextManager[object]:
    return mock.patch.object(layout, "memory_format", lambda device: torch.contiguous_format)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, tuple[dict[str, object], Block]] = {
    "channels apart (NCHW)": ({}, _channels_apart),
    "deterministic algorithms": ({}, _deterministic),
    "compile = true": ({"compile": True}, nullcontext),
}


def _limit(job: Job, trainees: Sequence[Trainee], size: int) -> str:
    with FlopCounterMode(display=False) as shared:
        job.pass_backbone()
    with FlopCounterMode(display=False) as whole:
        job.step(trainees[:1])
    backbone = shared.get_total_flops()
    flops = whole.get_total_flops() - backbone + backbone / size
    half = half_precision(job.protocol, job.group)
    rate = matrix_rate(half or torch.float32, job.group.device)
    return f"{flops / 1e9:.0f} GFLOP at {rate / 1e12:.0f} TFLOP/s: {time_text(flops / rate)}"


def _precisions() -> list[str]:
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return ["mixed", "bf16"] if has_bf16 else ["mixed"]


def _in_own_process(work: Callable[..., list[Comparison]], *arguments: object) -> list[Comparison]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()
