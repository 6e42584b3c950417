"""What of a run was made from other data than the data sets hold now: counts, checkpoints, failures
and backbones. They record the fingerprint of the packed data set that they were made from.

A cell that has such files is stale: it is neither reduced nor resumed nor trained anew without the
user's word, which is `grid --retrain stale`. That moves the files to RUN/stale; the cell is then
missing like any other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.manifest import read_fingerprint
from hpc import checkpoint
from hpc.atomic import Damaged, read_json, rename_file
from hpc.checkpoint import Checkpoint
from hpc.command import UserError
from jobs.cell import Cell, RunPaths, pretraining_cell
from jobs.counts_file import CountsIndex
from pipeline.grid import Grid

WHY = "other data"


@dataclass(frozen=True)
class Stale:
    """`files`: by the signature of each stale cell, what is to be set aside before it is trained
    anew. `backbones`: the keys of the backbones among them."""

    files: Mapping[str, tuple[Path, ...]]
    backbones: frozenset[str]


def find_stale(
    grid: Grid,
    done: Mapping[str, CountsIndex],
    saved: Mapping[str, Checkpoint],
    failures: Mapping[str, Path],
) -> Stale:
    """Compare the fingerprints that a run's files record with those of the data sets.

    Args:
        done: the counts of each finished cell, by signature.
        saved: the newest checkpoint of each cell that is not done, by signature.
        failures: the record of each cell whose loss was not finite, by signature.
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
        elif _is_other(saved.get(name), present):
            found = _checkpoints(grid.run, cell, present)
        found += _failure(failures.get(name), present)
        if cell.protocol.weights == "pretrain":
            found += backbones[cell.backbone_key]
        if found:
            files[name] = tuple(found)
    return Stale(files, frozenset(key for key, of_it in backbones.items() if of_it))


def fingerprints(grid: Grid) -> dict[str, str]:
    """The fingerprint of each data set that is packed and can be read, by name."""
    found = {}
    for name, settings in grid.datasets.items():
        with suppress(UserError):  # submissions say what is wrong with it
            found[name] = read_fingerprint(settings.shards)
    return found


def set_aside(run: RunPaths, files: Iterable[Path]) -> None:
    """Move files and folders of a run to the same places below RUN/stale. Raises `UserError`."""
    for path in dict.fromkeys(files):
        if path.exists():
            target = run.stale / path.relative_to(run.root)
            names = (target.with_name(f"{target.name}.{number}") for number in itertools.count(2))
            rename_file(path, next(p for p in itertools.chain([target], names) if not p.exists()))


def other_data(index: CountsIndex, present: str) -> bool:
    """Whether counts are those of other data than the data set of this fingerprint."""
    return bool(index.record.get("manifest", present) != present)


def _counts(index: CountsIndex, present: str) -> list[Path]:
    # the index first: without it the counts do not count
    return [index.path.with_suffix(".json"), index.path] if other_data(index, present) else []


def _is_other(saved: Checkpoint | None, present: str) -> bool:
    return saved is not None and saved.record.get("inputs", {}).get("data set", present) != present


def _checkpoints(run: RunPaths, cell: Cell, present: str) -> list[Path]:
    """The checkpoints of a cell that were made from other data."""
    found = checkpoint.find(run.checkpoints(cell.bundle_key))[0]
    return [c.path for c in found if cell.signature in c.checksums and _is_other(c, present)]


def _failure(path: Path | None, present: str) -> list[Path]:
    if path is not None:
        with suppress(Damaged, FileNotFoundError, AttributeError):
            if read_json(path).get("inputs", {}).get("data set", present) != present:
                return [path]
    return []


def _backbone(run: RunPaths, cell: Cell, present: str) -> list[Path]:
    """The files of the backbone that `weights = "pretrain"` trains for a cell, if they were made
    from other data; where it is not trained yet, the checkpoints or the failure of its training."""
    path = run.backbone(cell.backbone_key)
    try:
        record = read_json(path.with_suffix(".json"))
    except FileNotFoundError:
        trained = pretraining_cell(cell)
        failure = _failure(run.failure(trained.signature), present)
        return [*_checkpoints(run, trained, present), *failure]
    except Damaged:  # the jobs that need it say so
        return []
    other = record.get("manifest", present) != present
    return [path.with_suffix(".json"), path] if other else []
