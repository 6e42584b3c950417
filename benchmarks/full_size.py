"""Measure whole jobs of the paper's networks at full size, with loaders, on a GPU if there is one.

    python -m benchmarks.full_size [--models NAME ...] [--cells 1 4] [--steps 2] [--batch 2] ...

Prints steps per second with and without waiting for data, milliseconds per step by part, and peak
memory. It also compares the bits of a cell over all jobs that train it. A profiled job waits for
the GPU at the end of each part.

Every job is `jobs.train` in a new process, or in one for each rank with --ranks. It trains the
steps, evaluates two images, and writes heads and counts. Weights are random. With --warm N a second
job trains N steps, and its times are subtracted as the cost of a start. An example for two GPUs:

    python -m benchmarks.full_size --cells 1 8 32 --warm 10 --steps 100 --batch 12 --workers 8 \\
        --ranks 2 --set precision=mixed --set deterministic=true
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.large_run import LOSSES
from hpc.cli import UserError, run
from hpc.storage.atomic import read_json
from jobs.spec.task import Task, write_task

if TYPE_CHECKING:
    from pipeline.config.grid_file import Grid

MODELS = ("fcn_resnet101", "deeplabv3_resnet101")
PARTS = ("data", "backbone", "heads", "losses", "optimiser", "communication", "other")
GRID = """
name = "full-size"
seeds = [0]
models = {models}
losses = {losses}
run_dir = "{folder}/runs"

[dataset.streets]
source = "synthetic"
shards = "{folder}/streets"
train = {images}
val = 2
size = {picture}

[protocol]
weights = "{folder}/weights.pt"
epochs = {steps}
batch_size = {batch}
crop = [{crop}, {crop}]
threads = {threads}
workers = {workers}
{more}
"""


def main(argv: Sequence[str]) -> int:
    """Measure, print a table, and return 1 if a cell's bits depend on its job."""
    if argv[:1] == ["job"]:
        return _train(*argv[1:])
    options = _options(argv)
    bits: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, options)
        names = ["model", "cells", "steps a second", "without data"]
        names += [*(f"{part}, ms" for part in PARTS), "peak GB of host (and GPU)"]
        print(f"| {' | '.join(names)} |\n|---|{'---:|' * (len(names) - 1)}")
        for model in options.models:
            for number in options.cells:
                start = _job(folder, model, number, options.warm, options) if options.warm else {}
                found = _job(folder, model, number, options.warm + options.steps, options)
                print(_row(model, number, found, start), flush=True)
                for cell, own in found["bits"].items():
                    bits.setdefault(f"{model} {cell}", set()).add(own)
    differ = [cell for cell, own in bits.items() if len(own) > 1]
    print(f"cells whose weights and counts depend on their job: {', '.join(differ) or 'none'}")
    return 1 if differ else 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--cells", nargs="+", type=int, default=[1, 4], metavar="N")
    parser.add_argument("--picture", nargs=2, type=int, default=[520, 693], metavar="PIXELS")
    for name, value in (("crop", 480), ("batch", 2), ("warm", 0), ("steps", 2), ("threads", 2),
                        ("workers", 1), ("ranks", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="more of [protocol]"
    )
    options = parser.parse_args(argv)
    for number in options.cells:
        if not 1 <= number <= len(LOSSES):
            parser.error(f"a job has 1 to {len(LOSSES)} cells, not {number}")
    if min(options.steps, options.warm + 1) < 1:
        parser.error("--steps is 1 or more, and --warm 0 or more")
    for text in options.set:
        if "=" not in text:
            parser.error(f"--set takes KEY=VALUE, not {text}")
    if len({model.partition("_")[2] for model in options.models}) > 1:
        parser.error("the models of one run share a backbone")
    return options


def _prepare(folder: Path, options: argparse.Namespace) -> None:
    """Pack the data set and write the weights of the backbone."""
    import torch

    from benchmarks.bundle_job import settled
    from data_prep.pack import pack

    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 224, 224), generator=draw, dtype=torch.uint8)
    backbone = settled(options.models[0].partition("_")[2], images)
    torch.save(backbone.state_dict(), folder / "weights.pt")
    grid = _grid(folder, options.steps, options)
    pack("streets", grid.datasets["streets"], processes=os.cpu_count() or 1)


def _grid(folder: Path, steps: int, options: argparse.Namespace) -> Grid:
    """Return the grid whose jobs train `steps` steps."""
    from pipeline.config.grid_file import read_grid

    settings = {
        **vars(options),
        "models": json.dumps(list(options.models)),
        "losses": json.dumps(LOSSES[: max(options.cells)]),
        "images": options.batch,
        "steps": steps,
        "more": "\n".join(_assignment(*text.split("=", 1)) for text in options.set),
    }
    path = folder / "grid.toml"
    path.write_text(GRID.format(folder=folder, **settings))
    return read_grid(path)


def _assignment(key: str, value: str) -> str:
    is_plain = value in ("true", "false") or value[:1].isdigit() or value.startswith("[")
    return f"{key} = {value if is_plain else json.dumps(value)}"


def _job(
    folder: Path, model: str, number: int, steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train the first `number` cells of a model; return the job's memory, profile and bits."""
    grid = _grid(folder, steps, options)
    cells = tuple(cell for cell in grid.cells if cell.model == model)[:number]
    run, record = tempfile.mkdtemp(dir=folder), folder / "record.json"
    settings = grid.datasets["streets"]
    task = Task(
        kind="bundle", name="job", run=run, data=settings.shards, origin=settings.origin(),
        cells=cells,
    )  # fmt: skip
    command = [sys.executable]
    if options.ranks > 1:
        ranks = f"--nproc-per-node={options.ranks}"
        command += ["-m", "torch.distributed.run", "--standalone", ranks]
    command += ["-m", "benchmarks.full_size", "job", str(write_task(task)), str(record)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    stopped = [read_json(path)["reason"] for path in task.paths.failures.glob("*.json")]
    if stopped:
        raise UserError(
            f"{model}: {len(stopped)} of {number} cells stopped ({stopped[0]}), so the times would "
            "be those of fewer cells; choose other settings"
        )
    found: dict[str, Any] = json.loads(record.read_text())
    profile = json.loads(task.paths.profile(task.name, 1, "training").read_text())
    return {**found, "bits": _bits(task), "steps": profile["steps"], "ranks": profile["ranks"]}


def _bits(task: Task) -> dict[str, str]:
    """Return a digest of the weights and counts of each cell, by its loss."""
    from hpc.storage.atomic import file_sha256, fingerprint
    from jobs.spec.counts_file import read_counts, read_index

    (path,) = task.paths.counts.glob("*.json")
    index = read_index(path)
    arrays = read_counts(index)
    return {
        cell.loss.name: fingerprint(
            [file_sha256(task.paths.head(cell.signature)),
             *(array[position].tolist() for array in arrays.values())]
        )
        for position, cell in enumerate(task.cells)
    }  # fmt: skip


def _row(model: str, number: int, found: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """Return a line of the table for the steps of `found` beyond those of `start`."""
    steps = found["steps"] - start.get("steps", 0)
    mean = {part: _mean(found, part) - _mean(start, part) for part in PARTS}
    total = sum(mean.values())  # without saving, which this job does only at its end
    numbers = [steps / total, steps / (total - mean["data"])]
    numbers += [1000 * mean[part] / steps for part in PARTS]
    shown = " | ".join(f"{number:.4g}" for number in numbers)
    memory = f"{found['host']:.1f}" + (f", {found['gpu']:.1f}" if "gpu" in found else "")
    return f"| {model} | {number} | {shown} | {memory} |"


def _mean(found: Mapping[str, Any], part: str) -> float:
    """Return the seconds of a part, averaged over ranks; 0 without ranks."""
    ranks = found.get("ranks", ())
    return sum(rank.get(part, 0.0) for rank in ranks) / max(len(ranks), 1)


def _train(task: str, record: str) -> int:
    """Run one rank of a job."""
    import torch

    from hpc.distributed.launcher import read_env
    from jobs import train

    ended = train.main([task, "--profile"])
    if read_env().rank == 0:
        memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
        if torch.cuda.is_available():
            memory["gpu"] = torch.cuda.max_memory_allocated() / 1e9
        Path(record).write_text(json.dumps(memory))
    return ended


if __name__ == "__main__":
    run(main)
