"""Find what was made from other data than the data sets hold now: counts, checkpoints, failures and
backbones. Each records the fingerprint of its packed data set.

A cell with such files is stale. It is neither reduced nor resumed. Only `grid --retrain stale`
trains it again: that command moves the files to RUN/stale, and the cell is then missing like any
other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards.manifest import read_fingerprint
from hpc.cli import UserError
from hpc.storage import checkpoint
from hpc.storage.atomic import Damaged, read_json, rename_file
from hpc.storage.checkpoint import Checkpoint
from jobs.spec.cell import Cell, pretraining_cell
from jobs.spec.counts_file import CountsIndex
from jobs.spec.run_paths import RunPaths
from pipeline.config.grid_file import Grid

WHY = "its data set has changed"


@dataclass(frozen=True)
class Stale:
    """The files that were made from other data.

    Attributes:
        files: The files to set aside before a stale cell is trained again, by signature.
        backbones: The keys of the backbones among them.
    """

    files: Mapping[str, tuple[Path, ...]]
    backbones: frozenset[str]


def find_stale(
    grid: Grid,
    done: Mapping[str, CountsIndex],
    saved: Mapping[str, Checkpoint],
    failures: Mapping[str, Mapping[str, Any]],
) -> Stale:
    """Compare the fingerprints that a run's files record with those of the data sets.

    Args:
        done: the counts of each finished cell, by signature.
        saved: the newest checkpoint of each cell that is not done, by signature.
        failures: what the record of each cell says whose loss was not finite, by signature.
    """
    now = fingerprints(grid)
    files: dict[str, tuple[Path, ...]] = {}
    cells = [cell for cell in grid.cells if cell.dataset in now]
    backbones = {
        cell.backbone_key: _backbone(grid.run, cell, now[cell.dataset])
        for cell in {c.backbone_key: c for c in cells if c.protocol.weights == "pretrain"}.values()
    }
    for cell in cells:
        name, present = cell.signature, now[cell.dataset]
        found: list[Path] = []
        if name in done:
            found = _counts(done[name], present)
            if not found:
                continue
        elif name in saved and _is_of_other(saved[name].record, present):
            found = _checkpoints(grid.run, cell, present)
        if name in failures and _is_of_other(failures[name], present):
            found.append(grid.run.failure(name))
        if cell.protocol.weights == "pretrain":
            found += backbones[cell.backbone_key]
        if found:
            files[name] = tuple(found)
    return Stale(files, frozenset(key for key, of_it in backbones.items() if of_it))


def fingerprints(grid: Grid) -> dict[str, str]:
    """Return the fingerprint of each packed data set that can be read, by name."""
    found = {}
    for name, settings in grid.datasets.items():
        with suppress(UserError):  # submissions say what is wrong with it
            found[name] = read_fingerprint(settings.shards)
    return found


def failure_record(path: Path) -> dict[str, Any]:
    """Return the record of a failure; an empty one if it is missing or damaged."""
    try:
        return read_json(path)
    except (Damaged, FileNotFoundError):
        return {}


def stale_line(grid: Grid, number: int) -> str:
    """Return a line about `number` stale cells and the command that trains them again."""
    command = f"python -m pipeline.submit grid {grid.command_arguments} --retrain stale"
    return (
        f"{number} cells are stale (their data set has changed) and are left out; `{command}` "
        "trains them again"
    )


def set_aside(run: RunPaths, files: Iterable[Path]) -> None:
    """Move files and folders of a run to the same places below RUN/stale. Raises `UserError`."""
    for path in dict.fromkeys(files):
        if path.exists():
            target = run.stale / path.relative_to(run.root)
            names = (target.with_name(f"{target.name}.{number}") for number in itertools.count(2))
            rename_file(path, next(p for p in itertools.chain([target], names) if not p.exists()))


def other_data(index: CountsIndex, present: str) -> bool:
    """Return whether counts come from other data than the data set with fingerprint `present`."""
    return bool(index.record["manifest"] != present)


def _counts(index: CountsIndex, present: str) -> list[Path]:
    # the index first: without it the counts do not count
    return [index.path.with_suffix(".json"), index.path] if other_data(index, present) else []


def _is_of_other(record: Mapping[str, Any], present: str) -> bool:
    """Return whether the record of a checkpoint or a failure names other data as its input. The
    record of a damaged failure is empty."""
    return bool(record.get("inputs", {}).get("data set", present) != present)


def _checkpoints(run: RunPaths, cell: Cell, present: str) -> list[Path]:
    """Return the checkpoints of a cell that were made from other data."""
    found = checkpoint.find(run.checkpoints(cell.bundle_key))[0]
    ours = [c for c in found if cell.signature in c.checksums]
    return [c.path for c in ours if _is_of_other(c.record, present)]


def _backbone(run: RunPaths, cell: Cell, present: str) -> list[Path]:
    """Return the files of a pre-trained backbone that were made from other data. If it is not
    trained yet, these are the checkpoints or the failure of its training."""
    path = run.backbone(cell.backbone_key)
    try:
        record = read_json(path.with_suffix(".json"))
    except FileNotFoundError:
        trained = pretraining_cell(cell)
        failure = run.failure(trained.signature)
        other = _is_of_other(failure_record(failure), present)
        return [*_checkpoints(run, trained, present), *([failure] if other else [])]
    except Damaged:  # the jobs that need it say so
        return []
    return [path.with_suffix(".json"), path] if record["manifest"] != present else []
