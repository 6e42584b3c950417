"""One step of the paper's networks at full size, alone and in a bundle of four: how long it takes,
how much memory, and whether the bits are the same.

    python -m benchmarks.full_size [--crop 480] [--batch 2] [--threads 2] [--models NAME ...]

Every job is a process of its own that trains one step with `jobs.train`, evaluates one image and
leaves its heads. The weights are random, in files of the published names.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOSSES = ("CE", "WDLWCE", "CEMP", "TL")
MODELS = ("fcn_resnet101", "deeplabv3_resnet101")
GRID = """
name = "full-size"
seeds = [0]
models = {models}
losses = {losses}
run_dir = "{folder}/runs"

[dataset.streets]
source = "synthetic"
shards = "{folder}/streets"
train = {batch}
val = 1
size = [{crop}, {crop}]

[protocol]
epochs = 1
batch_size = {batch}
resize = [{crop}, {crop}]
crop = [{crop}, {crop}]
eval_size = 0
threads = {threads}
workers = 0
"""


def main() -> int:
    """Measure, print a table, and return 1 if a cell's bits depend on its job."""
    options = _options()
    same = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TORCH_HOME"] = str(folder / "torch")
        _prepare(folder, options)
        print("| model | job | cells | backbone s | heads s | peak memory GB |")
        print("|---|---|---|---|---|---|")
        for model in options.models:
            bundle = _job(folder, model, LOSSES)
            for loss in LOSSES:
                alone = _job(folder, model, (loss,))
                same &= alone["bits"][loss] == bundle["bits"][loss]
    print(f"a cell's weights and counts are the same bits alone and in its bundle: {same}")
    return 0 if same else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    for name, value in (("crop", 480), ("batch", 2), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def _prepare(folder: Path, options: argparse.Namespace) -> None:
    """The grid file, the packed data set, and the weights file that both models share."""
    import torch
    from torchvision.models import resnet101

    from data_prep.pack import pack
    from data_prep.weights import weights_path
    from pipeline.grid import read_grid

    path = folder / "grid.toml"
    settings = {**vars(options), "models": list(MODELS), "losses": list(LOSSES)}
    path.write_text(GRID.format(folder=folder, **settings).replace("'", '"'))
    pack("streets", read_grid(path).datasets["streets"], processes=1)
    torch.manual_seed(0)
    file = weights_path("imagenet", MODELS[0])
    file.parent.mkdir(parents=True)
    torch.save(resnet101().state_dict(), file)


def _job(folder: Path, model: str, losses: tuple[str, ...]) -> dict[str, Any]:
    """Run one job; the record that `_train` leaves, whose numbers are printed as a row."""
    record = folder / "record.json"
    arguments = [str(folder), str(record), model, *losses]
    program = "import sys; from benchmarks.full_size import _train; _train(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(record.read_text())
    job = "bundle" if len(losses) > 1 else f"{losses[0]} alone"
    numbers = (f"{found[key]:.1f}" for key in ("backbone", "heads", "memory"))
    print(f"| {model} | {job} | {len(losses)} | {' | '.join(numbers)} |", flush=True)
    return found


def _train(folder: str, record: str, model: str, *losses: str) -> None:
    from hpc.atomic import file_sha256
    from jobs import backbone, train
    from jobs.counts_file import read_counts, read_index
    from jobs.task import Task, write_task
    from pipeline.grid import read_grid

    backbone.check_published = lambda path: None  # random weights under a published name
    seconds = {"features": 0.0, "step": 0.0}
    train.features = _timed(train.features, seconds)
    train.Trainee.step = _timed(train.Trainee.step, seconds)
    grid = read_grid(Path(folder) / "grid.toml")
    cells = tuple(c for c in grid.cells if c.model == model and c.loss.name in losses)
    run = tempfile.mkdtemp(dir=folder)
    shards = grid.datasets["streets"].shards
    task = Task(kind="bundle", name="job", run=run, data=shards, cells=cells)
    train.main([str(write_task(task))])
    (path,) = task.paths.counts.glob("*.json")
    index = read_index(path)
    assert [cell["signature"] for cell in index.cells] == [cell.signature for cell in cells]
    arrays = read_counts(index)
    bits = {
        cell.loss.name: [
            file_sha256(task.paths.head(cell.signature)),
            *(array[position].tolist() for array in arrays.values()),
        ]
        for position, cell in enumerate(cells)
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    content = {"backbone": seconds["features"], "heads": seconds["step"], "memory": peak}
    Path(record).write_text(json.dumps({**content, "bits": bits}))


def _timed(function: Callable[..., Any], seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        seconds[function.__name__] += time.perf_counter() - start
        return result

    return timed


if __name__ == "__main__":
    sys.exit(main())
