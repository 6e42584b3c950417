"""Check and measure the GPU path on this chip, in 10 minutes at most: `make gpu`.

    python -m benchmarks.gpu_check [PART ...] [--out DIR] [--small]

Prints one table and writes DIR/gpu_check.json with the chip, its driver and torch. Each row has
what was expected by arithmetic and what was found. The exit code is 1 if bits differ, a test fails,
or a part ends with an error. Slow results do not change it: they are what the run is for.

The work is that of the paper: ResNet-101, 480 x 480, batch 12, 21 classes, with random weights and
one random batch on the GPU. Expected seconds are the operations of the step, counted by torch, at
the rate of a large matrix product on this chip, and at a quarter of that rate. For chips that
docs/explanation/cost.md names, the seconds at its assumed rate follow. Expected memory is the
estimate that `submit --dry-run` shows. `--small` uses small networks and runs on a CPU too; the
tests run it so.

Each part runs in processes of its own, which are killed when its time is over.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.bundle_job import CLASSES, LOSSES, Job, published, ready
from benchmarks.gpu import in_short
from benchmarks.measure import (
    best_seconds,
    copy_bandwidth,
    matrix_rate,
    synchronised,
    time_in_turns,
    time_text,
)
from data_prep.pack import pack
from data_prep.settings import parse_dataset
from data_prep.shards.reader import SplitReader
from hpc.distributed.launcher import read_env
from hpc.distributed.preemption import StopRequest
from hpc.distributed.process_group import COMMUNICATION, Group
from hpc.scheduler.exit_cause import exit_cause
from jobs.models import memory_format
from jobs.models.resize import Resize
from jobs.spec.protocol import Protocol
from jobs.spec.task import Task
from jobs.training import evaluate
from jobs.training.cell_trainer import CellTrainer, half_precision
from jobs.training.job_run import JobRun
from pipeline.planning import cost_model
from pipeline.planning.cost_model import FLOPS

SECONDS, PART_SECONDS = 600, 180  # of the whole run and of one part, at most
STEPS = 3  # of a training whose bits are compared
# operations a second that docs/explanation/cost.md assumes, by a part of the chip's name
ASSUMED = {
    ("V100", "fp32"): FLOPS["gpu fp32"],
    ("V100", "mixed"): FLOPS["gpu mixed"],
    ("A100", "mixed"): 90e12,
    ("H100", "mixed"): 150e12,
}
Cells = tuple[int, int]  # number of FCN and of DeepLabV3 heads


@dataclass(frozen=True)
class Size:
    """The size of the work.

    Attributes:
        backbone: the backbone of all cells.
        batch: images of a step.
        crop: side of an image in pixels.
        bundles: heads of the measured bundles, in rising order.
        formats: heads of the bundle in both memory formats.
        images: evaluated images.
        picture: height and width of an evaluated image in pixels.
        threads: counting threads of the evaluations.
        rounds: rounds of each measurement.
        published: torchvision's model for the published way.
    """

    backbone: str = "resnet101"
    batch: int = 12
    crop: int = 480
    bundles: tuple[Cells, ...] = ((1, 0), (8, 0), (16, 16))
    formats: Cells = (4, 4)
    images: int = 20
    picture: tuple[int, int] = (520, 693)
    threads: tuple[int, ...] = (2, 8)
    rounds: int = 3
    published: str = "fcn_resnet101"

    def protocol(self, precision: str, **more: Any) -> Protocol:
        """Return the protocol of a step in `precision`."""
        fixed = {"weights": "none", "batch_size": self.batch, "crop": [self.crop, self.crop],
                 "threads": 1, "workers": 0}  # fmt: skip
        return Protocol.model_validate({**fixed, "precision": precision, **more})

    def job(self, group: Group, protocol: Protocol) -> Job:
        """Return a job without cells."""
        return Job(f"fcn_{self.backbone}", group, protocol)


SMALL = Size(
    "mobilenet_v3_large", 2, 48, ((1, 0), (2, 1)), (1, 1), images=3, picture=(40, 56),
    threads=(1, 2), rounds=1, published="deeplabv3_mobilenet_v3_large",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the table; `failed` decides the exit code, `numbers` go into the JSON file."""

    what: str
    expected: str
    found: str
    failed: bool = False
    numbers: Mapping[str, float] = field(default_factory=dict)


def tests(size: Size) -> Iterator[Row]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/jobs", "-k"]
    done = subprocess.run([*command, "real_gpu"], capture_output=True, text=True, check=False)
    last = (done.stdout.strip() or done.stderr.strip() or "nothing").rpartition("\n")[2]
    passed = done.returncode == 0 and " passed" in last and "skipped" not in last
    yield Row("tests named real_gpu", "all pass", last.strip("= "), failed=not passed)


def bits(size: Size) -> Iterator[Row]:
    """Train one cell alone and in a bundle of 4, with deterministic algorithms."""
    losses = ("CE", "DLNWCE", "WDL", "CEMP")
    for precision in precisions():
        with ready(size.protocol(precision, deterministic=True)) as group:
            alone, _ = _trained(size, precision, group, losses[1:2])
            bundle, parts = _trained(size, precision, group, losses)
        what = f"a cell alone and in a bundle of {len(losses)}, {STEPS} steps, {precision}"
        yield _equal(what, _same(alone[0], bundle[1]))
        per_step = ", ".join(f"{name} {time_text(s / STEPS)}" for name, s in parts.items())
        yield Row(f"parts of that bundle's step, {precision}", "", per_step, numbers=parts)


def formats(size: Size) -> Iterator[Row]:
    """Measure a bundle in fp32 in both memory formats, without and with `deterministic`."""
    for deterministic in (False, True):
        with ready(size.protocol("fp32", deterministic=deterministic)) as group:
            expected, seconds = _in_both_formats(size, group)
        mode = ", deterministic" if deterministic else ""
        for name, found in seconds.items():
            what = f"a step of {_named(size.formats)}, fp32{mode}, {name}"
            yield _timed(what, expected, found)
        best = min(seconds, key=lambda name: median(seconds[name]))
        yield Row(f"the faster format in fp32{mode}, see jobs/models/memory_format.py", "", best)


def _in_both_formats(size: Size, group: Group) -> tuple[Expected, dict[str, tuple[float, ...]]]:
    choices = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
    steps = {}
    for name, choice in choices.items():
        with _format(choice):
            job, trainers = _bundle(size, group, size.protocol("fp32"), size.formats)
        steps[name] = synchronised(partial(job.step, trainers), group.device)
    return _limit(job, trainers, size.formats), time_in_turns(steps, size.rounds)


def upsampling(size: Size) -> Iterator[Row]:
    """Measure upsampling forward and backward: as matrix products, and torch's."""
    device = _device()
    stride = 8
    logits = torch.randn(size.batch, CLASSES, size.crop // stride, size.crop // stride)
    logits = logits.to(device).requires_grad_()
    whole = (size.crop, size.crop)
    gradient = torch.randn(size.batch, CLASSES, *whole, device=device)

    def run(resize: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return synchronised(lambda: torch.autograd.grad(resize(logits), logits, gradient), device)

    def by_torch(x: Tensor) -> Tensor:
        return F.interpolate(x, size=whole, mode="bilinear", align_corners=False)

    ways = {"matrix products": run(lambda x: Resize.apply(x, whole)), "torch": run(by_torch)}
    seconds = time_in_turns(ways, size.rounds)
    bandwidth = gpu.copy_bandwidth() if device.type == "cuda" else copy_bandwidth()
    # the output is written once, and its gradient read once
    expected = Expected(2 * 4 * gradient.numel() / bandwidth)
    for name in ways:
        yield _timed(f"upsampling {size.batch} x {CLASSES} logits, {name}", expected, seconds[name])


def bundles(size: Size) -> Iterator[Row]:
    """Measure steps of bundles of each size, and their memory in a step and while saving."""
    for precision in reversed(precisions()):  # the faster ones first
        for cells in size.bundles:
            with ready(size.protocol(precision)) as group:
                rows = _of_bundle(size, group, precision, cells)
            yield from rows


def _of_bundle(size: Size, group: Group, precision: str, cells: Cells) -> list[Row]:
    # the trainers must be freed before their process group
    job, trainers = _bundle(size, group, size.protocol(precision), cells)
    what = f"{_named(cells)}, {precision}"
    expected = _limit(job, trainers, cells)
    step = synchronised(partial(job.step, trainers), group.device)
    seconds = time_in_turns({"": step}, size.rounds)[""]
    rows = [_timed(f"a step of {what}", expected, seconds, {"steps a second": 1 / median(seconds)})]
    peak = _peak(step, group)
    with tempfile.TemporaryDirectory() as folder:
        run = _job_run(Path(folder), job, trainers)
        began = time.perf_counter()
        saving = _peak(lambda: run.save(1, trainers, job.backbone), group)
        saved = time.perf_counter() - began
    rows.append(Row(f"saving {what}", "", time_text(saved)))
    if peak is None or saving is None:
        return rows
    estimate = _estimated_gb(trainers)
    tensors = (estimate - cost_model.CUDA / 1e9) / cost_model.LOST
    return [
        *rows,
        _gigabytes(f"memory of the GPU in a step of {what}", estimate, peak.whole),
        _gigabytes(f"memory of tensors in a step of {what}", tensors, peak.tensors),
        _gigabytes(f"memory of tensors while saving {what}", peak.tensors, saving.tensors),
    ]


def published_way(size: Size) -> Iterator[Row]:
    """Measure a step of one run as the published code does it."""
    for precision in precisions():
        with ready(size.protocol(precision)) as group:
            row = _as_published(size, group, precision)
        yield row


def _as_published(size: Size, group: Group, precision: str) -> Row:
    protocol = size.protocol(precision)
    job = Job(size.published, group, protocol)
    step = synchronised(published(job, half_precision(protocol, group)), group.device)
    what = f"a step of one run as published, {precision}"
    try:
        expected = _expected(_operations(step), protocol, group)
        return _timed(what, expected, time_in_turns({"": step}, size.rounds)[""])
    except RuntimeError as error:  # out of memory has several forms
        return Row(what, "", in_short(error))


def evaluation(size: Size) -> Iterator[Row]:
    """Evaluate images with all cells of the largest bundle, with each number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        table = {"source": "synthetic", "shards": folder, "train": 1, "val": size.images,
                 "size": list(size.picture)}  # fmt: skip
        manifest = pack("streets", parse_dataset("streets", table, "gpu"), processes=1)
        with ready(size.protocol("fp32", eval_size=0)) as group:
            rows = _evaluations(size, group, SplitReader(manifest, "val"))
    yield from rows


def _evaluations(size: Size, group: Group, reader: SplitReader) -> list[Row]:
    cells, protocol = size.bundles[-1], size.protocol("fp32", eval_size=0)
    job, trainers = _bundle(size, group, protocol, cells)
    for network in (job.backbone, *(trainer.network for trainer in trainers)):
        network.eval()

    def forward(images: Tensor) -> list[Tensor]:
        inputs = job.backbone(images)
        return [trainer.network(inputs) for trainer in trainers]

    passes, counted = _costs_of_an_image(size, group, protocol, forward)
    rows = []
    for threads in size.threads:
        with mock.patch.object(evaluate, "counting_threads", return_value=threads):
            began = time.perf_counter()
            evaluate.evaluate(
                forward, len(trainers), reader, CLASSES, protocol, group, lambda: False
            )
            seconds = time.perf_counter() - began
        counting = len(trainers) * counted / threads
        # a GPU passes one image while the CPU counts another
        longest = max(passes, counting) if group.device.type == "cuda" else passes + counting
        what = f"evaluation of {size.images} images x {len(trainers)} cells, {threads} threads"
        rows.append(_timed(what, Expected(size.images * longest), (seconds,)))
    return rows


@torch.no_grad()
def _costs_of_an_image(
    size: Size, group: Group, protocol: Protocol, forward: evaluate.Forward
) -> tuple[float, float]:
    """Return the least seconds of a forward pass, and those of counting a cell with one thread."""
    image = torch.rand(1, 3, *size.picture, device=group.device)
    passes = _operations(lambda: forward(image)) / _matrix_rate(protocol, group)
    logits = forward(image)[0][0].float().cpu()
    label = torch.zeros(size.picture, dtype=torch.uint8)
    return passes, best_seconds(lambda: evaluate.count(logits, label, protocol, 1))


def resume(size: Size) -> Iterator[Row]:
    """Stop and resume a bundle of 2, and compare it with an undisturbed one."""
    for precision in precisions():
        with ready(size.protocol(precision, deterministic=True)) as group:
            same = _resumes(size, group, precision)
        yield _equal(f"{2 * STEPS} steps, stopped and resumed after {STEPS}, {precision}", same)


def _resumes(size: Size, group: Group, precision: str) -> bool:
    losses = ("CE", "DLNWCE")
    whole, _ = _trained(size, precision, group, losses, 2 * STEPS)
    job = size.job(group, size.protocol(precision, deterministic=True))
    with tempfile.TemporaryDirectory() as folder:
        trainers = job.cells(losses)
        for _ in range(STEPS):
            job.step(trainers)
        _job_run(Path(folder), job, trainers).save(STEPS, trainers, job.backbone)
        again = job.cells(losses)
        begun = _job_run(Path(folder), job, again).resume(again, job.backbone)
    for _ in range(STEPS):
        job.step(again)
    return begun == STEPS and all(
        _same(one, trainer.state()) for one, trainer in zip(whole, again, strict=True)
    )


def ranks(size: Size) -> Iterator[Row]:
    """Train on all GPUs of the node, and let one rank run out of memory."""
    on_gpus = torch.cuda.is_available()
    number = torch.cuda.device_count() if on_gpus else 2
    if number < 2:
        yield Row("several ranks", "", "not run: there is one GPU")
        return
    small = not on_gpus
    yield from _run("on_each_rank", small, 0.6 * PART_SECONDS, number)
    began = time.monotonic()
    *_, last = _run("without_one_rank", small, 0.3 * PART_SECONDS, number)
    seconds = time.monotonic() - began
    lost = "out of memory" in last.found
    found = f"all gone after {time_text(seconds)}" if lost else last.found
    yield Row(f"rank {number - 1} of {number} out of memory", "its reason is last", found, not lost)


def on_each_rank(size: Size) -> Iterator[Row]:
    """Do the work of a rank: train 4 cells twice, and compare; rank 0 tells."""
    losses = ("CE", "DLNWCE", "WDL", "CEMP")
    for precision in precisions():
        protocol = size.protocol(precision, deterministic=True)
        env = read_env()  # each group has names of its own in torchrun's store
        with ready(protocol, replace(env, start_id=f"{env.start_id}-{precision}")) as group:
            once, _ = _trained(size, precision, group, losses)  # connects the ranks, too
            again, parts = _trained(size, precision, group, losses)
            same = all(map(_same, once, again))
            weights = torch.cat([t.flatten() for one in once for t in one["network"].values()])
            equal = torch.equal(weights, group.broadcast(weights)) and same
            failed = group.max(int(not equal)) > 0
        if group.is_main:
            of = f"{len(losses)} cells on {group.world_size} ranks, {precision}"
            yield _equal(f"{of}: trained twice, and on all ranks", not failed)
            step = time_text(sum(parts.values()) / STEPS)
            exchange = time_text(parts.get(COMMUNICATION, 0.0) / STEPS)
            yield Row(f"a step of {of}", "", f"{step}, {exchange} of them exchange", numbers=parts)


def without_one_rank(size: Size) -> Iterator[Row]:
    """Do the work of a rank while the last one runs out of memory."""
    with ready(size.protocol("fp32"), read_env()) as group:
        job = size.job(group, size.protocol("fp32"))
        trainers = job.cells(("CE",))
        for step in range(STEPS):
            if step == STEPS - 1 and group.rank == group.world_size - 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Raised on purpose")
            job.step(trainers)
    yield Row("the last rank", "out of memory", "trained to the end", failed=True)


PARTS: dict[str, Callable[[Size], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        bits, resume, ranks, formats, upsampling, bundles, evaluation, published_way, tests,
    )
}  # fmt: skip
OF_RANKS = {part.__name__: part for part in (on_each_rank, without_one_rank)}


def precisions() -> list[str]:
    """Return fp32 and the half precisions that the device has."""
    if not torch.cuda.is_available():
        return ["fp32", "bf16"]
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return ["fp32", "mixed", "bf16"] if has_bf16 else ["fp32", "mixed"]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bundle(
    size: Size, group: Group, protocol: Protocol, cells: Cells
) -> tuple[Job, list[CellTrainer]]:
    job = size.job(group, protocol)
    losses = [LOSSES[i % len(LOSSES)] for i in range(max(cells))]
    trainers = job.cells(losses[: cells[0]])
    return job, trainers + job.cells(losses[: cells[1]], f"deeplabv3_{size.backbone}")


def _named(cells: Cells) -> str:
    """Return `16 FCN and 16 DeepLabV3`, the names of docs/explanation/cost.md."""
    names = zip(cells, ("FCN", "DeepLabV3"), strict=True)
    return " and ".join(f"{number} {name}" for number, name in names if number)


def _trained(
    size: Size, precision: str, group: Group, losses: Sequence[str], steps: int = STEPS
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the states of cells that have trained `steps` steps, and the seconds by part."""
    job = size.job(group, size.protocol(precision, deterministic=True))
    trainers = job.cells(losses)
    group.watch.start()
    for _ in range(steps):
        job.step(trainers)
    parts = group.watch.lap()
    group.watch.running = False
    return [trainer.state() for trainer in trainers], parts


def _equal(what: str, same: bool) -> Row:
    return Row(what, "equal bits", "equal bits" if same else "other bits", failed=not same)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two states of a cell have the same bits."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def _job_run(folder: Path, job: Job, trainers: Sequence[CellTrainer]) -> JobRun:
    """Return a new start of a job of these cells whose run directory is `folder`."""
    cells = tuple(trainer.cell for trainer in trainers)
    task = Task(kind="bundle", name="gpu", run=str(folder), data="", origin={}, cells=cells)
    run = JobRun(task, job.group, StopRequest(), {})
    run.begin(0)
    return run


def _format(choice: torch.memory_format) -> Any:
    return mock.patch.object(memory_format, "memory_format", lambda *_: choice)


def _operations(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Expected:
    """Seconds at the rate of the hardware, and at the rate of the page on cost, if it has one."""

    lowest: float
    of_page: float | None = None

    def __str__(self) -> str:
        page = f"; page: {time_text(self.of_page)}" if self.of_page else ""
        return f"{time_text(self.lowest)} to {time_text(4 * self.lowest)}{page}"


def _expected(operations: float, protocol: Protocol, group: Group) -> Expected:
    lowest = operations / _matrix_rate(protocol, group)
    if group.device.type == "cpu":
        return Expected(lowest)
    name = torch.cuda.get_device_name(group.device)
    rates = [
        rate for (chip, precision), rate in ASSUMED.items()
        if chip in name and precision == protocol.precision
    ]  # fmt: skip
    return Expected(lowest, operations / rates[0] if rates else None)


def _limit(job: Job, trainers: Sequence[CellTrainer], cells: Cells) -> Expected:
    """Return the expected seconds of a step, counted with one head of each kind."""
    backbone = _operations(job.pass_backbone)
    operations = float(backbone)
    for number, first in zip(cells, (0, cells[0]), strict=True):
        if number:
            step = partial(job.step, trainers[first : first + 1])
            operations += number * (_operations(step) - backbone)
    return _expected(operations, job.protocol, job.group)


def _matrix_rate(protocol: Protocol, group: Group) -> float:
    return matrix_rate(half_precision(protocol, group) or torch.float32, group.device)


def _peak(work: Callable[[], object], group: Group) -> gpu.Peak | None:
    """Return the peak of GPU memory; None on a CPU, after the same work."""
    if group.device.type == "cuda":
        return gpu.peak(work, group.device)
    work()
    return None


def _estimated_gb(trainers: Sequence[CellTrainer]) -> float:
    job = cost_model.Job([trainer.cell for trainer in trainers], 0, 0.0, CLASSES)
    return cost_model.gpu_bytes(job, ranks=1) / 1e9


def _timed(
    what: str, expected: Expected, seconds: Sequence[float], more: Mapping[str, float] | None = None
) -> Row:
    found = median(seconds)
    numbers = {"seconds": found, "expected seconds": expected.lowest, **(more or {})}
    return Row(what, str(expected), time_text(found), numbers=numbers)


def _gigabytes(what: str, expected: float, found: float) -> Row:
    numbers = {"GB": found, "expected GB": expected}
    return Row(what, f"at most {expected:.2f} GB", f"{found:.2f} GB", numbers=numbers)


def main(argv: Sequence[str]) -> int:
    """Run the parts one after the other, print the table and write the JSON file."""
    options = _options(argv)
    if options.child:
        return _write_rows(options.names[0], SMALL if options.small else Size(), options.out)
    if not torch.cuda.is_available() and not options.small:
        print("error: torch sees no GPU; --small runs the parts on a CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    deadline, failed, record = time.monotonic() + SECONDS, False, {}
    machine = gpu.in_own_process(chip)  # so that this process holds no GPU
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print("\n| what | expected | found |\n|---|---:|---:|", flush=True)
    for name in options.names or PARTS:
        left = deadline - time.monotonic()
        rows = _run(name, options.small, min(PART_SECONDS, left)) if left > 0 else []
        rows = rows or [Row(name, "", f"not run: the {SECONDS} s are over")]
        for row in rows:
            print(f"| {row.what} | {row.expected} | {row.found} |", flush=True)
        failed |= any(row.failed for row in rows)
        record[name] = [asdict(row) for row in rows]
        text = json.dumps({"machine": machine, "parts": record}, indent=1)
        (options.out / "gpu_check.json").write_text(text + "\n")  # kept if a later part hangs
    return int(failed)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), metavar="DIR")
    parser.add_argument("--small", action="store_true", help="a small network, on a CPU too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    known = PARTS | OF_RANKS if options.child else PARTS
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"unknown part {unknown[0]}; choose from {', '.join(PARTS)}")
    return options


def _run(name: str, small: bool, seconds: float, number: int = 1) -> list[Row]:
    """Return the rows of a part, run in `number` new processes for at most `seconds`.

    The last row says why it failed, if it did.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        command = [sys.executable, "-m", "benchmarks.gpu_check"]
        if number > 1:
            torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
            command[2:2] = [*torchrun, "-m"]
        command += [name, "--child", "--out", str(path), *["--small"] * small]
        why = _ended(command, seconds)
        lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return [*rows, Row(name, "", why, failed=True)] if why else rows


def _ended(command: Sequence[str], seconds: float) -> str:
    """Run `command` and all that it starts for at most `seconds`; return why it failed, or ""."""
    with tempfile.NamedTemporaryFile("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"killed after {seconds:.0f} s"
        finally:
            for process in [*_descendants(child.pid), child.pid]:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            child.wait()
        return (exit_cause("", [Path(log.name)]).line or f"exit code {code}") if code else ""


def _descendants(process: int) -> list[int]:
    """Return all processes that `process` has started, also those in sessions of their own."""
    try:
        listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [one for child in map(int, listed) for one in (child, *_descendants(child))]


def _write_rows(name: str, size: Size, path: Path) -> int:
    """Append the rows of a part as lines of JSON, each as soon as it is known."""
    for row in (PARTS | OF_RANKS)[name](size):
        with path.open("a") as file:
            print(json.dumps(asdict(row)), file=file)
    return 0


def chip() -> dict[str, str]:
    """Return the chip, its driver, and the versions of torch and its libraries."""
    if not torch.cuda.is_available():
        return {"chip": "CPU", "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        driver = done.stdout.partition("\n")[0]
    except OSError:
        driver = ""
    return {
        "chip": f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, "
        f"sm_{properties.major}{properties.minor}",
        "driver": driver or "unknown",
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
