"""The task file: the work of one job. submitit gets only its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from hpc.cli import UserError
from hpc.config import Settings
from hpc.storage.atomic import Damaged, fingerprint, read_json, write_json
from jobs.spec.cell import KEY_LENGTH, Cell
from jobs.spec.run_paths import RunPaths


class Task(Settings):
    """Train `cells`, which share a bundle key, or pre-train the backbone of one cell."""

    model_config = ConfigDict(strict=False)  # read from JSON, see `Cell`

    kind: Literal["bundle", "pretrain"]
    name: str
    run: str  # the run directory
    data: str  # the folder of the data set's shards
    origin: dict[str, Any]  # the settings they are packed with, see `DatasetSettings.origin`
    node_local: str = ""  # folder on each node's disk for a copy of the shards; "" makes none
    cells: tuple[Cell, ...]
    source: dict[str, str] = Field(default_factory=dict)  # commit and diff of the submitting code

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.run)


def bundle_task_name(cells: list[Cell], step: int) -> str:
    """Return the name of a task: its data set, its seed, and a hash of `step` and its cells.

    The same cells at the same step get the same name, so that planning can be repeated.
    """
    first = cells[0]
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in first.dataset)[:40]
    identity = fingerprint([step, sorted(cell.signature for cell in cells)])[:KEY_LENGTH]
    return f"{words}-seed{first.seed}-{identity}"


def write_task(task: Task) -> Path:
    """Write the task file into the run directory. Return its path."""
    path = task.paths.task(task.name)
    write_json(path, task.model_dump(mode="json"))
    return path


def read_task(path: str | Path, kind: str | None = None) -> Task:
    """Read a task file. Raises `UserError` if it is missing, damaged, or not of `kind`."""
    try:
        task = Task.model_validate(read_json(path))
    except OSError as error:
        raise UserError(f"cannot read the task {path}: {error.strerror}") from error
    except ValidationError as error:
        raise Damaged(f"{path} is a task of another version; run grid again") from error
    if kind not in (None, task.kind):
        raise UserError(
            f"{path} is a task of kind {task.kind}, not {kind}; start the program of that kind"
        )
    return task
