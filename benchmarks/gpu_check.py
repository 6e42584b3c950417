"""Check and measure the GPU path on this chip, in 10 minutes at most: `make gpu`.

    python -m benchmarks.gpu_check [PART ...] [--out DIR] [--small]

Prints one table and writes DIR/gpu_check.json with the chip, its driver and torch. Each row has
what was expected by arithmetic and what was found. The exit code is 1 if bits differ, a test fails,
or a part ends with an error. Slow results do not change it: they are what the run is for.

The work is that of the paper: ResNet-101, 480 x 480, batch 12, 21 classes, with random weights and
one random batch on the GPU. Expected seconds are the operations of the step, counted by torch, at
the rate of a large matrix product on this chip (first number) and at half of that rate (second).
Expected memory is the estimate that `submit --dry-run` shows. `--small` uses a small network and
runs on a CPU too; the tests run it so.

Each part runs in a process of its own and is ended when the time is over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bundle_job import CLASSES, LOSSES, Job, published, ready
from benchmarks.gpu import in_short, peak_gb
from benchmarks.measure import best_seconds, matrix_rate, synchronised, time_in_turns, time_text
from data_prep.pack import pack
from data_prep.settings import parse_dataset
from data_prep.shards.reader import SplitReader
from hpc.distributed.preemption import StopRequest
from hpc.distributed.process_group import Group
from jobs.models import memory_format
from jobs.models.resize import Resize
from jobs.spec.protocol import Protocol
from jobs.spec.task import Task
from jobs.training import evaluate
from jobs.training.cell_trainer import CellTrainer, half_precision
from jobs.training.job_run import JobRun
from pipeline.planning import cost_model

SECONDS = 600  # of the whole run
STEPS = 3  # of a training whose bits are compared


@dataclass(frozen=True)
class Size:
    """The size of the work.

    Attributes:
        model: the model of all cells.
        batch: images of a step.
        crop: side of an image in pixels.
        bundles: cells of the measured bundles, in rising order.
        formats: cells of the bundle in both memory formats.
        images: evaluated images.
        picture: height and width of an evaluated image in pixels.
        threads: counting threads of the evaluations.
        rounds: rounds of each measurement.
    """

    model: str = "fcn_resnet101"
    batch: int = 12
    crop: int = 480
    bundles: tuple[int, ...] = (1, 8, 32)
    formats: int = 8
    images: int = 20
    picture: tuple[int, int] = (520, 693)
    threads: tuple[int, ...] = (2, 8)
    rounds: int = 3

    def protocol(self, precision: str, **more: Any) -> Protocol:
        """Return the protocol of a step in `precision`."""
        fixed = {"weights": "none", "batch_size": self.batch, "crop": [self.crop, self.crop],
                 "threads": 1, "workers": 0}  # fmt: skip
        return Protocol.model_validate({**fixed, "precision": precision, **more})


SMALL = Size("deeplabv3_mobilenet_v3_large", 2, 48, (1, 3), 2, 3, (40, 56), (1, 2), 1)


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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/jobs", "-k"]
    done = subprocess.run([*command, "real_gpu"], capture_output=True, text=True, check=False)
    last = (done.stdout.strip() or done.stderr.strip() or "nothing").rpartition("\n")[2]
    yield Row("tests named real_gpu", "all pass", last.strip("= "), failed=done.returncode != 0)


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
    """Measure a bundle in fp32 in both memory formats."""
    with ready(size.protocol("fp32")) as group:
        expected, seconds = _in_both_formats(size, group)
    for name, found in seconds.items():
        yield _timed(f"a step of {size.formats} cells, fp32, {name}", expected, found)


def _in_both_formats(size: Size, group: Group) -> tuple[float, dict[str, tuple[float, ...]]]:
    choices = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
    steps = {}
    for name, choice in choices.items():
        with _format(choice):
            job, trainers = _bundle(size, group, size.protocol("fp32"), size.formats)
        steps[name] = synchronised(partial(job.step, trainers), group.device)
    return _limit(job, trainers), time_in_turns(steps, size.rounds)


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
    large, moved = gradient.numel() * 4, torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(moved)
    copy = best_seconds(synchronised(lambda: target.copy_(moved), device))
    bandwidth = 2 * moved.numel() / copy
    lowest = 2 * large / bandwidth  # the output is written once, its gradient read once
    for name in ways:
        yield _timed(f"upsampling {size.batch} x {CLASSES} logits, {name}", lowest, seconds[name])


def bundles(size: Size) -> Iterator[Row]:
    """Measure steps of bundles of each size, and their memory in a step and while saving."""
    for precision in precisions():
        for cells in size.bundles:
            with ready(size.protocol(precision)) as group:
                rows = _of_bundle(size, group, precision, cells)
            yield from rows


def _of_bundle(size: Size, group: Group, precision: str, cells: int) -> list[Row]:
    # the trainers must be freed before their process group
    job, trainers = _bundle(size, group, size.protocol(precision), cells)
    expected, what = _limit(job, trainers), f"a step of {cells} cells, {precision}"
    step = synchronised(partial(job.step, trainers), group.device)
    seconds = time_in_turns({"": step}, size.rounds)[""]
    rows = [_timed(what, expected, seconds, {"steps a second": 1 / median(seconds)})]
    peak = _peak(step, group)
    with tempfile.TemporaryDirectory() as folder:
        run = _job_run(Path(folder), job, trainers)
        began = time.perf_counter()
        saving = _peak(lambda: run.save(1, trainers, job.backbone), group)
        saved = time.perf_counter() - began
    rows.append(Row(f"saving {cells} cells, {precision}", "", time_text(saved)))
    if peak is None or saving is None:
        return rows
    estimate = _estimated_gb(trainers)
    return [
        *rows,
        _gigabytes(f"peak memory of {what}", estimate, peak),
        _gigabytes(f"peak memory while saving {cells} cells, {precision}", peak, saving),
    ]


def published_way(size: Size) -> Iterator[Row]:
    """Measure a step of one run as the published code does it."""
    for precision in precisions():
        with ready(size.protocol(precision)) as group:
            row = _as_published(size, group, precision)
        yield row


def _as_published(size: Size, group: Group, precision: str) -> Row:
    protocol = size.protocol(precision)
    job = Job(size.model, group, protocol)
    step = synchronised(published(job, half_precision(protocol, group)), group.device)
    what = f"a step of one run as published, {precision}"
    try:
        expected = _operations(step) / _matrix_rate(protocol, group)
        return _timed(what, expected, time_in_turns({"": step}, size.rounds)[""])
    except torch.OutOfMemoryError as error:
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
            evaluate.evaluate(forward, cells, reader, CLASSES, protocol, group, lambda: False)
            seconds = time.perf_counter() - began
        counting = cells * counted / threads
        # a GPU passes one image while the CPU counts another
        longest = max(passes, counting) if group.device.type == "cuda" else passes + counting
        what = f"evaluation of {size.images} images x {cells} cells, {threads} counting threads"
        rows.append(_timed(what, size.images * longest, (seconds,)))
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
    job = Job(size.model, group, size.protocol(precision, deterministic=True))
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


PARTS: dict[str, Callable[[Size], Iterator[Row]]] = {
    part.__name__: part
    for part in (tests, bits, resume, formats, upsampling, bundles, evaluation, published_way)
}


def precisions() -> list[str]:
    """Return fp32 and the half precisions that the device has."""
    if not torch.cuda.is_available():
        return ["fp32", "bf16"]
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return ["fp32", "mixed", "bf16"] if has_bf16 else ["fp32", "mixed"]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bundle(
    size: Size, group: Group, protocol: Protocol, cells: int
) -> tuple[Job, list[CellTrainer]]:
    job = Job(size.model, group, protocol)
    return job, job.cells([LOSSES[i % len(LOSSES)] for i in range(cells)])


def _trained(
    size: Size, precision: str, group: Group, losses: Sequence[str], steps: int = STEPS
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the states of cells that have trained `steps` steps, and the seconds by part."""
    job = Job(size.model, group, size.protocol(precision, deterministic=True))
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


def _limit(job: Job, trainers: Sequence[CellTrainer]) -> float:
    """Return the seconds of a step at the rate of a matrix product."""
    backbone = _operations(job.pass_backbone)
    heads = (_operations(lambda: job.step(trainers[:1])) - backbone) * len(trainers)
    return (backbone + heads) / _matrix_rate(job.protocol, job.group)


def _matrix_rate(protocol: Protocol, group: Group) -> float:
    return matrix_rate(half_precision(protocol, group) or torch.float32, group.device)


def _peak(work: Callable[[], object], group: Group) -> float | None:
    """Return the peak of GPU memory in GB; None on a CPU, after the same work."""
    if group.device.type == "cuda":
        return peak_gb(work, group.device)
    work()
    return None


def _estimated_gb(trainers: Sequence[CellTrainer]) -> float:
    job = cost_model.Job([trainer.cell for trainer in trainers], 0, 0.0, CLASSES)
    return cost_model.gpu_bytes(job, ranks=1) / 1e9


def _timed(
    what: str, lowest: float, seconds: Sequence[float], more: Mapping[str, float] | None = None
) -> Row:
    found = median(seconds)
    numbers = {"seconds": found, "expected seconds": lowest, **(more or {})}
    expected = f"{time_text(lowest)} to {time_text(2 * lowest)}"
    return Row(what, expected, time_text(found), numbers=numbers)


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
    machine = chip()
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print("\n| what | expected | found |\n|---|---:|---:|", flush=True)
    for name in options.names or PARTS:
        rows = _part(name, options.small, deadline - time.monotonic())
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
    if unknown := [name for name in options.names if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]}; choose from {', '.join(PARTS)}")
    return options


def _part(name: str, small: bool, seconds: float) -> list[Row]:
    """Return the rows of a part, run in a new process for at most `seconds`."""
    if seconds <= 0:
        return [Row(name, "", f"not run: the {SECONDS} s are over")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu_check",
            name,
            "--child",
            "--out",
            str(path),
        ]
        command += ["--small"] * small
        why = ""
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, check=False
            )
            if done.returncode:
                why = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"ended: the {SECONDS} s are over"
        lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return [*rows, Row(name, "", why, failed=True)] if why else rows


def _write_rows(name: str, size: Size, path: Path) -> int:
    """Write the rows of a part as lines of JSON, each as soon as it is known."""
    with path.open("w") as file:
        for row in PARTS[name](size):
            print(json.dumps(asdict(row)), file=file, flush=True)
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
