"""Small real runs: a grid on the drawn streets that trains in a second, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from hpc.storage import checkpoint
from jobs.spec.cell import Cell
from jobs.spec.counts_file import read_counts, read_index
from jobs.spec.run_paths import RunPaths
from jobs.spec.task import Task, write_task
from pipeline.config.grid_file import Grid, read_grid
from tests.pipeline.grids import grid_file

STEPS = 3 * (11 // 2)  # epochs, and batches of two of the eleven streets
SECONDS = 0.15  # between checkpoints


def grid_of(folder: Path, data: Path, *losses: str, **protocol: object) -> Grid:
    """A grid of one model and one seed whose run is in `folder`."""
    settings = {"threads": 1, "workers": 1, "checkpoint_minutes": SECONDS / 60, **protocol}
    epochs = settings.pop("epochs", 3)
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    folder.mkdir(parents=True, exist_ok=True)
    path = grid_file(
        folder,
        ("seeds = [0, 1]", "seeds = [0]"),
        (', "deeplabv3_mobilenet_v3_large"', ""),
        ('losses = ["CE", "DLNWCE"]', f"losses = {json.dumps(losses)}"),
        (f'shards = "{folder}/streets"', f'shards = "{data}"'),
        ("train = 6\nval = 3\nsize = [32, 40]", "train = 11\nval = 3\nsize = [40, 56]"),
        ("epochs = 2", f"epochs = {epochs}"),
        ("threads = 1\n", lines),
        more="\n[protocol.pretrain]\nepochs = 5\nbatch_size = 5\n",
    )
    return read_grid(path)


def task_of(grid: Grid, cells: Iterable[Cell] = (), kind: str = "bundle") -> Path:
    """The file of a task that trains `cells`, or all of the grid."""
    settings = grid.datasets["streets"]
    chosen = tuple(cells) or grid.cells
    task = Task(
        kind=kind, name=kind, run=str(grid.run.root), data=settings.shards,
        origin=settings.origin(), cells=chosen,
    )  # fmt: skip
    return write_task(task)


def results(run: RunPaths) -> dict[str, tuple[dict, dict]]:
    """Head weights and counts by cell name, of all jobs of a run."""
    found = {}
    for path in run.counts.glob("*.json"):
        index = read_index(path)
        arrays = read_counts(index)
        for position, cell in enumerate(map(index.of_cell, index.signatures)):
            assert cell["name"] not in found, "a cell was trained twice"
            head = torch.load(run.head(cell["signature"]), weights_only=True)
            counts = {name: array[position] for name, array in arrays.items()}
            found[cell["name"]] = (head["weights"], counts)
    return found


def assert_same(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    (weights, counts), (other_weights, other_counts) = one, other
    assert weights.keys() == other_weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(tensor, other_weights[key]), key
    assert counts.keys() == other_counts.keys()
    for key, array in counts.items():
        assert np.array_equal(array, other_counts[key]), key


def assert_all_same(one: dict, other: dict) -> None:
    """As `assert_same`, of all cells of a run."""
    assert one.keys() == other.keys()
    assert one
    for name, result in one.items():
        assert_same(result, other[name])


def steps_saved(grid: Grid) -> list[int]:
    """The steps of all checkpoints of a run, oldest first."""
    return sorted(
        saved.step
        for key in {cell.bundle_key for cell in grid.cells}
        for saved in checkpoint.find(grid.run.checkpoints(key))[0]
    )


def half_written(grid: Grid) -> list[Path]:
    """The temporary folders of checkpoints that are being written, or never will be whole."""
    return list((grid.run.root / "checkpoints").glob("*/.tmp-*"))


def is_done(grid: Grid) -> bool:
    return any(grid.run.counts.glob("*.json"))
