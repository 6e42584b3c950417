"""The task file: what one job does. submitit gets its path; everything else is read from it."""

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
    """Train `cells`, which share a bundle key, or pre-train the backbone they will share."""

    model_config = ConfigDict(strict=False)  # a record, see Cell

    kind: Literal["bundle", "pretrain"]
    name: str
    run: str  # the run directory
    data: str  # the folder of the data set's shards
    origin: dict[str, Any]  # how these were to be packed, see `DatasetSettings.origin`
    node_local: str = ""  # a folder on each node's own disk, for a copy of them
    cells: tuple[Cell, ...]
    source: dict[str, str] = Field(default_factory=dict)  # commit and diff of the planning code

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.run)


def bundle_task_name(cells: list[Cell], step: int) -> str:
    """A name that the same cells at the same step always get, so that planning twice is planning
    once; it starts with words a person can read."""
    first = cells[0]
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in first.dataset)[:40]
    identity = fingerprint([step, sorted(cell.signature for cell in cells)])[:KEY_LENGTH]
    return f"{words}-seed{first.seed}-{identity}"


def write_task(task: Task) -> Path:
    """Put the task into its run directory; the path of its file."""
    path = task.paths.task(task.name)
    write_json(path, task.model_dump(mode="json"))
    return path


def read_task(path: str | Path, kind: str | None = None) -> Task:
    """Raises `UserError` if there is no such task, it is damaged, or not of `kind`."""
    try:
        task = Task.model_validate(read_json(path))
    except OSError as error:
        raise UserError(f"cannot read the task {path}: {error.strerror}") from error
    except ValidationError as error:
        raise Damaged(f"{path} is a task of another version; run grid again") from error
    if kind not in (None, task.kind):
        raise UserError(f"{path} is a task of kind {task.kind}, not {kind}; use its own program")
    return task
