"""Run a grid as a user does: pack, pre-train, train, reduce, report; and go on after a kill."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from hpc.scheduler.auto import open_queue
from hpc.scheduler.local_jobs import LocalJobs, processes, take_lock
from hpc.storage import checkpoint
from pipeline import predict, status
from pipeline import submit as command
from pipeline.config.grid_file import Grid, read_grid
from pipeline.scores.results_file import DatasetResults, read_results
from pipeline.submission.submitter import submit
from tests.hpc.scheduler.hostile import HOSTILE
from tests.jobs.small_runs import assert_all_same, results, steps_saved
from tests.pipeline.whole_runs.test_killed import wait_until

GRID = """
name = "tiny"
seeds = [0, 1]
models = ["fcn_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"]
losses = ["CE", "DLNWCE"]
run_dir = "{run}"

[dataset.streets]
source = "synthetic"
shards = "{shards}"
train = 12
val = 5
size = [48, 64]

[protocol]
epochs = 2
batch_size = 2
learning_rate = 0.05
resize = [40, 64]
crop = [48, 48]
eval_size = 0
weights = "pretrain"
threads = 1

[protocol.pretrain]
epochs = 1
batch_size = 2
learning_rate = 0.02

[cluster]
kind = "local"
"""


def write_grid(folder: Path, shards: Path | str, more: str = "") -> Path:
    """Write a grid file with `more` lines in [protocol]."""
    path = folder / "run.toml"
    text = GRID.format(run=folder / "run", shards=shards)
    path.write_text(text.replace("threads = 1\n", f"threads = 1\n{more}\n"))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Grid, str]:
    """An undisturbed run of the tiny grid by `all --wait`, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_grid(folder, folder / "data")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.submit", "all", config, "--wait"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return read_grid(config), done.stdout


def reduced(grid: Grid) -> DatasetResults:
    """Return the results of the one data set."""
    (dataset,) = read_results(grid.run.results).datasets
    return dataset


def test_all_ends_with_a_table_a_page_and_counts_of_every_cell(finished):
    grid, printed = finished
    arrays = reduced(grid).counts
    assert [cell["name"] for cell in reduced(grid).cells] == [cell.name for cell in grid.cells]
    [path] = Path(grid.datasets["streets"].shards).glob("val-*.h5")
    with h5py.File(path) as shard:
        labels = shard["labels"][...]
    assert (arrays["pixels"] + arrays["void"] == labels.size).all()
    assert (arrays["images"] == 5).all()
    per_class = np.bincount(labels, minlength=256)[:8]
    assert (arrays["confusion"].sum(axis=2) == per_class).all()
    with (grid.run.report / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["loss"]) for row in rows] == [
        (model, loss.name) for model in grid.models for loss in grid.losses
    ]
    assert all(row["seeds"] == "2" for row in rows)
    assert str(grid.run.report / "index.html") in printed
    page = (grid.run.report / "index.html").read_text()
    assert "trained on streets itself" in page  # the report says where the backbone came from


def test_losses_seeds_and_models_give_different_networks(finished):
    grid, _ = finished
    scores = reduced(grid).counts["class_bins"]  # predictions alone may agree after so few steps
    assert len({bins.tobytes() for bins in scores}) == len(grid.cells)


def test_after_the_end_of_a_cell_its_checkpoint_is_gone(finished):
    grid, _ = finished
    for cell in grid.cells:
        assert checkpoint.find(grid.run.checkpoints(cell.bundle_key)) == ([], [])


def test_grid_again_submits_nothing(finished, capsys):
    grid, _ = finished
    before = sorted(grid.run.submitted.iterdir())
    assert command.main(["grid", str(grid.path)]) == 0
    assert "8 done" in capsys.readouterr().out
    assert sorted(grid.run.submitted.iterdir()) == before
    assert status.main([str(grid.path)]) == 0
    assert capsys.readouterr().out.count("done") >= len(grid.cells)


def test_a_trained_cell_labels_photographs(finished, tmp_path, monkeypatch):
    grid, _ = finished
    for name, value in {**HOSTILE, "WORLD_SIZE": "2"}.items():  # no rank to wait for
        monkeypatch.setenv(name, value)
    images = sorted((Path(grid.datasets["streets"].shards) / "source" / "val").glob("*.jpg"))[:2]
    words = [grid.cells[-1].name, *images, "--out", tmp_path, "--config", grid.path]
    assert not predict.main([str(word) for word in words])
    for image in images:
        labels = np.asarray(Image.open(tmp_path / f"{image.stem}.png"))
        confidence = np.asarray(Image.open(tmp_path / f"{image.stem}-confidence.png"))
        assert labels.shape == confidence.shape == (48, 64)
        assert labels.max() < 8
        assert confidence.min() >= 255 // 8  # the highest of 8 scores is at least 1 / 8


def kill_all(jobs: LocalJobs) -> None:
    """Kill the runner first, so that it notes nothing, then the jobs."""
    runner = next(
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(jobs.folder).encode() in command_line(entry)
    )
    os.kill(runner, signal.SIGKILL)
    with (jobs.folder / "lock").open() as lock:
        wait_until(lambda: take_lock(lock))
    for lock in jobs.folder.glob("local-*.lock"):
        for pid in processes(lock):
            os.kill(pid, signal.SIGKILL)
        # a dying process keeps its lock longer than other users than root see what it has open
        with lock.open() as file:
            wait_until(lambda file=file: take_lock(file))


def command_line(process: Path) -> bytes:
    try:
        words = (process / "cmdline").read_bytes()
    except OSError:
        return b""
    return words if b"hpc.scheduler.local" in words else b""


@pytest.mark.slow
def test_after_a_power_failure_the_next_grid_ends_with_the_same_bits(finished, tmp_path, capsys):
    """Reduce and report of before run behind the cells that are left."""
    undisturbed, _ = finished
    often = "checkpoint_minutes = 0.002"
    grid = read_grid(write_grid(tmp_path, undisturbed.datasets["streets"].shards, often))
    backbones = undisturbed.run.backbone("").parent
    shutil.copytree(backbones, tmp_path / "run" / backbones.name)
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue)
    jobs = submit(grid, queue, ["grid", "reduce", "report"])
    wait_until(lambda: steps_saved(grid))
    kill_all(LocalJobs(grid.run.queue))
    saved = max(steps_saved(grid))
    assert not list(grid.run.counts.glob("*.h5")), "the kill came after the end"

    capsys.readouterr()
    assert status.main([str(grid.path)]) == 0
    said = capsys.readouterr().out
    assert "tiny: 8 cells: 4 interrupted, 4 missing\n" in said, said
    assert "3 jobs wait, but no process starts them; `python -m pipeline.submit grid " in said

    assert command.main(["grid", str(grid.path), "--wait"]) == 0
    said = "cancelled, to run after the cells of this submission: reduce, report\n"
    assert said in capsys.readouterr().out
    outcomes = queue.job_states([*jobs["reduce"], *jobs["report"]])
    assert [job.why for job in outcomes.values()] == ["cancelled", "cancelled"]
    logs = "".join(log.read_text() for log in grid.run.logs.rglob("*_log.err"))
    assert f"resuming at step {saved}\n" in logs
    assert_all_same(results(grid.run), results(undisturbed.run))
    np.testing.assert_equal(reduced(grid).counts, reduced(undisturbed).counts)
    assert 'name="lossgrid-cells" content="8"' in grid.run.page.read_text(encoding="utf-8")
    assert status.main([str(grid.path)]) == 0
    assert "older" not in capsys.readouterr().out
