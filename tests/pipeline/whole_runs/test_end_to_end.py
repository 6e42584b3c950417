"""A grid as a user runs it: packed, pre-trained, trained, killed, resumed, reduced, reported."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from hpc.storage import checkpoint
from pipeline.config.grid_file import read_grid
from pipeline.scores.results_file import read_results
from tests.hpc.scheduler.hostile import HOSTILE

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
epochs = 4
batch_size = 2
learning_rate = 0.05
resize = [40, 64]
crop = [48, 48]
eval_size = 0
weights = "pretrain"
threads = 1
checkpoint_minutes = 0.005

[protocol.pretrain]
epochs = 3
batch_size = 2
learning_rate = 0.02

[cluster]
kind = "local"
"""
TOTAL_STEPS = 4 * 12 // 2


def command(module, *arguments, cwd, **options):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=300, **options,
    )  # fmt: skip


def write_grid(folder, run):
    path = folder / f"{run}.toml"
    path.write_text(GRID.format(run=folder / run, shards=folder / "data"))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of the tiny grid by `all --wait`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_grid(folder, "run")
    done = command("pipeline.submit", "all", config, "--wait", cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return read_grid(config), done.stdout


def heads(grid):
    return {
        cell.name: torch.load(grid.run.head(cell.signature), weights_only=True)["weights"]
        for cell in grid.cells
    }


def counts(grid):
    results = read_results(grid.run.results)
    (dataset,) = results.datasets
    return [cell["name"] for cell in dataset.cells], dataset.counts


def assert_bit_equal(one, other):
    for name, weights in heads(one).items():
        for key, tensor in heads(other)[name].items():
            assert torch.equal(tensor, weights[key]), f"{name}: {key}"
    names, arrays = counts(one)
    other_names, other_arrays = counts(other)
    assert names == other_names
    for key, array in arrays.items():
        assert np.array_equal(array, other_arrays[key]), key


def test_all_ends_with_a_table_a_page_and_counts_of_every_cell(finished):
    grid, printed = finished
    names, arrays = counts(grid)
    assert names == [cell.name for cell in grid.cells]
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
    scores = counts(grid)[1]["class_bins"]  # predictions alone may agree after so few steps
    assert len({bins.tobytes() for bins in scores}) == len(grid.cells)


def test_after_the_end_of_a_cell_its_checkpoint_is_gone(finished):
    grid, _ = finished
    for cell in grid.cells:
        assert checkpoint.find(grid.run.checkpoints(cell.bundle_key)) == ([], [])


def test_grid_again_submits_nothing(finished):
    grid, _ = finished
    before = sorted(grid.run.submitted.iterdir())
    done = command("pipeline.submit", "grid", grid.path, cwd=grid.path.parent)
    assert done.returncode == 0, done.stderr
    assert "8 done" in done.stdout
    assert sorted(grid.run.submitted.iterdir()) == before
    status = command("pipeline.status", grid.path, cwd=grid.path.parent)
    assert status.stdout.count("done") >= len(grid.cells)


def test_a_trained_cell_labels_photographs(finished, tmp_path):
    grid, _ = finished
    images = sorted((Path(grid.datasets["streets"].shards) / "source" / "val").glob("*.jpg"))[:2]
    cell = grid.cells[-1]
    done = command(
        "pipeline.predict", cell.name, *images, "--out", tmp_path, "--config", grid.path,
        cwd=tmp_path, env={**os.environ, **HOSTILE, "WORLD_SIZE": "2"},  # no rank to wait for
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for image in images:
        labels = np.asarray(Image.open(tmp_path / f"{image.stem}.png"))
        confidence = np.asarray(Image.open(tmp_path / f"{image.stem}-confidence.png"))
        assert labels.shape == confidence.shape == (48, 64)
        assert labels.max() < 8
        assert confidence.min() >= 255 // 8  # the highest of 8 scores is at least 1 / 8


def training_processes(folder):
    """Ranks that train a bundle of the run in `folder`, and its queue's runner."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode()
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        ours = str(folder) in arguments
        if ours and (b"LOSSGRID_JOB_ID" in environment or "hpc.scheduler.local" in arguments):
            found.append(int(process.name))
    return found


def steps_saved(grid):
    return [
        saved.step
        for cell in grid.cells
        for saved in checkpoint.find(grid.run.checkpoints(cell.bundle_key))[0]
    ]


def test_killed_in_the_middle_and_run_again_gives_the_same_bits(finished, tmp_path):
    undisturbed, _ = finished
    config = write_grid(tmp_path, "run")
    grid = read_grid(config)
    assert command("data_prep.pack", config, cwd=tmp_path).returncode == 0
    assert command("pipeline.submit", "grid", config, cwd=tmp_path).returncode == 0

    deadline = time.monotonic() + 200
    while max(steps_saved(grid), default=0) < TOTAL_STEPS // 3:
        assert time.monotonic() < deadline, "training saved no checkpoint"
        time.sleep(0.01)
    for process in training_processes(grid.run.root):
        os.kill(process, signal.SIGKILL)
    saved = max(steps_saved(grid))
    assert 0 < saved < TOTAL_STEPS
    assert not list(grid.run.counts.glob("*.h5")), "the kill came after the end"

    again = command("pipeline.submit", "all", config, "--wait", cwd=tmp_path)
    assert again.returncode == 0, again.stderr + again.stdout
    logs = "".join(log.read_text() for log in grid.run.logs.rglob("*_log.err"))
    assert f"resuming at step {saved}" in logs
    assert_bit_equal(grid, undisturbed)


def test_stopped_by_a_signal_it_saves_the_step_it_reached(finished, tmp_path):
    undisturbed, _ = finished
    text = GRID.format(run=tmp_path / "run", shards=tmp_path / "data")
    config = tmp_path / "run.toml"
    config.write_text(text.replace("checkpoint_minutes = 0.005", "checkpoint_minutes = 60.0"))
    grid = read_grid(config)
    assert command("data_prep.pack", config, cwd=tmp_path).returncode == 0
    assert command("pipeline.submit", "grid", config, cwd=tmp_path).returncode == 0

    deadline = time.monotonic() + 200
    while not (progress := training_progress(grid)):
        assert time.monotonic() < deadline, "no bundle started to train"
        time.sleep(0.01)
    assert progress[0]["step"] < TOTAL_STEPS
    for process in training_processes(grid.run.root):
        os.kill(process, signal.SIGTERM)
    while training_processes(grid.run.root):
        assert time.monotonic() < deadline, "the job did not stop"
        time.sleep(0.01)
    assert any(record["stage"] == "stopped" for record in training_progress(grid))
    assert max(steps_saved(grid)) > 0  # no interval had passed: the signal alone made it save

    again = command("pipeline.submit", "all", config, "--wait", cwd=tmp_path)
    assert again.returncode == 0, again.stderr + again.stdout
    assert_bit_equal(grid, undisturbed)


def training_progress(grid):
    """Heartbeats of bundles that have made a step."""
    records = [json.loads(p.read_text()) for p in grid.run.progress.glob("streets-*.json")]
    return [record for record in records if record["step"] > 0]
