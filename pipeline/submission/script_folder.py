"""The folder that `--script DIR` writes: refused where something else lies in it, and brought up to
date where older scripts do."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc.cli import UserError
from hpc.storage.atomic import TEMPORARY_PREFIX, remove_file, write_bytes
from hpc.storage.permissions import require_private
from jobs.spec.task import Task
from pipeline.config.grid_file import Grid
from pipeline.submission.batch_scripts import MARK, SUBMIT, Part, note_name
from pipeline.tracking.submissions import Submitted, record_path, write_tasks

_OURS = re.compile(r"(prep|pretrain|train|reduce|report)(-[0-9]+)?\.sbatch|submit\.sh")
_ELSEWHERE = "choose another folder for --script"


def check_folder(folder: Path, grid: Grid) -> None:
    """Raise `UserError` unless `folder` can take scripts: it is missing, empty, or holds scripts of
    ours, others cannot write into it, and it is not part of what the grid writes."""
    real = Path(os.path.realpath(folder))
    taken = {"run directory": str(grid.run.root)}
    taken |= {f"shards folder of {name!r}": d.shards for name, d in grid.datasets.items()}
    for what, other in taken.items():
        if real.is_relative_to(os.path.realpath(other)):
            raise UserError(f"{folder} is in the {what}; {_ELSEWHERE}")
    there = next(place for place in (real, *real.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{there} is not a folder; {_ELSEWHERE}")
    require_private(folder, grid.cluster.group, _ELSEWHERE)
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {there}: Permission denied; {_ELSEWHERE}")
    if there == real:
        _refuse_others(folder)


def _refuse_others(folder: Path) -> None:
    for path in _entries(folder):
        if not (_OURS.fullmatch(path.name) and _is_ours(path)):
            raise UserError(
                f"{folder} holds {path.name!r}, which is not a script of ours; {_ELSEWHERE}"
            )


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, but for what a killed writer left."""
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith(TEMPORARY_PREFIX))
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; {_ELSEWHERE}") from error


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.readline() == b"#!/bin/bash\n" and file.readline().startswith(MARK.encode())
    except OSError:
        return False


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Make `folder` hold these scripts and no older ones. Raises `UserError`."""
    for name, text in files.items():
        # as paths are, whose bytes may be no text
        write_bytes(folder / name, text.encode("utf-8", "surrogateescape"))
    for path in _entries(folder):
        if path.name not in files and _OURS.fullmatch(path.name):
            remove_file(path)
    submit = folder / SUBMIT
    submit.chmod(submit.stat().st_mode | 0o100)


def write_record(grid: Grid, token: str, scripts: Sequence[Part], tasks: Sequence[Task]) -> None:
    """Note which tasks are which elements of which script, in place of the ids of jobs."""
    by_name = {task.name: task for task in tasks}
    elements = [
        Submitted.of(by_name[name], script=note_name(token, part), element=element)
        for part in scripts
        for element, (name, _) in enumerate(part.tasks)
    ]
    write_tasks(record_path(grid.run, token), elements)
