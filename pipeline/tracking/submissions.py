"""Submission records: the tasks that were to be submitted, and the jobs they became.

Each submission writes one JSON file before it asks the queue, so that a crash in between leaves a
trace, and writes it again with the ids of the jobs. The user submits batch scripts by hand, so
their jobs are not known: `submit.sh`, and every element of an array as it starts, leave a note with
the array's id, an empty file `submitted/RECORD-NAME.ID`.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpc.cli import UserError
from hpc.scheduler.base import Queue
from hpc.storage.atomic import Damaged, read_json, write_json
from jobs.spec.run_paths import RunPaths
from jobs.spec.task import Task

BUNDLE, PRETRAIN, CANCEL = "bundle", "pretrain", "cancel"
PREP, GRID, REDUCE, REPORT = STAGES = ("prep", "grid", "reduce", "report")  # in order
# the program of each kind of job
PROGRAMS = {
    PREP: "data_prep.pack",
    PRETRAIN: "jobs.pretrain",
    BUNDLE: "jobs.train",
    REDUCE: "pipeline.reduce",
    REPORT: "pipeline.report",
}
_NOTE = re.compile(r"(?P<script>.+)\.(?P<array>[0-9]+)")


@dataclass(frozen=True)
class Submitted:
    """One task of a submission, or one stage beside training.

    Attributes:
        task: The name of the task, or of the stage.
        kind: The kind of the task, or the name of the stage; "cancel" if the user cancelled it.
        cells: The signatures of its cells.
        backbone: The key of the backbone that it pre-trains.
        job: The job it became; "" if the submission ended before the queue answered.
        deferred: Why it was deferred to the next submission; "" if it was not.
        script: The batch script that holds it; its job is found by
            `noted_arrays`.
        element: Its place in the job array of `script`, or of the submission with `token`.
        granted: The resources of its job.
        at_most: The maximum number of cells per job with these resources; None for no limit. See
            `pipeline.tracking.outcomes`.
        token: The submission token of its array, see `recall`.
        needs: The jobs that must succeed before it starts.
    """

    task: str
    kind: str
    cells: tuple[str, ...] = ()
    backbone: str = ""
    job: str = ""
    deferred: str = ""
    script: str = ""
    element: int = 0
    granted: str = ""
    at_most: int | None = None
    token: str = ""
    needs: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: Task, **more: Any) -> Submitted:
        """Return the record of a task before it is submitted."""
        backbone = task.cells[0].backbone_key if task.kind == PRETRAIN else ""
        cells = tuple(cell.signature for cell in task.cells)
        return cls(task.name, task.kind, cells, backbone, **more)


class Submission:
    """The record of one submission, on disk after every change."""

    def __init__(self, run: RunPaths) -> None:
        self._path = record_path(run, new_token())
        self._tasks: dict[str, Submitted] = {}
        self._granted = ""
        self._at_most: Mapping[str, int] = {}

    def limits(self, granted: str, at_most: Mapping[str, int]) -> None:
        """Set the resources and limits of the tasks that are planned next.

        Args:
            granted: The resources of a job, in words.
            at_most: The maximum number of cells per job, by a cell's signature or the key of a
                backbone to be trained.
        """
        self._granted, self._at_most = granted, at_most

    def plan(self, tasks: Sequence[Task], deferred: Sequence[Task] = (), why: str = "") -> None:
        """Note tasks that are about to be submitted, and `deferred` ones with the reason `why`."""
        self._tasks |= {task.name: self._planned(task) for task in tasks}
        self._tasks |= {task.name: replace(self._planned(task), deferred=why) for task in deferred}
        self.write()

    def _planned(self, task: Task) -> Submitted:
        planned = Submitted.of(task, granted=self._granted)
        known = [
            self._at_most.get(name)
            for name in ([planned.backbone] if planned.backbone else planned.cells)
        ]
        at_most = min((most for most in known if most is not None), default=None)
        return replace(planned, at_most=at_most)

    def cancelled(self, tasks: Iterable[Submitted], whole: bool) -> None:
        """Note that tasks are cancelled: their jobs are about to be ended, and those without a job
        are no longer submitted. `whole`: the whole grid is cancelled."""
        for task in tasks:
            self._tasks[f"{task.task} {task.job}"] = replace(task, kind=CANCEL, deferred="")
        if whole:
            self._tasks[CANCEL] = Submitted(CANCEL, CANCEL)
        self.write()

    def defer(self, stages: Iterable[str], why: str) -> None:
        """Note that stages are deferred, see `deferred_stages`."""
        self._tasks |= {stage: Submitted(stage, stage, deferred=why) for stage in stages}
        self.write()

    def submitting(self, names: Sequence[str], needs: Sequence[str] = ()) -> str:
        """Note that tasks or stages are about to be submitted; return their submission token.

        Args:
            names: Names of planned tasks; any other name is a stage's.
            needs: The jobs that must succeed before they start.
        """
        earlier = {task.token for task in self._tasks.values()} - {""}
        token = f"{self._path.stem}-{len(earlier)}"
        for element, name in enumerate(names):
            self._tasks[name] = replace(
                self._known(name), token=token, element=element, needs=tuple(needs), deferred=""
            )
        self.write()
        return token

    def submitted(self, names: Sequence[str], jobs: Sequence[str]) -> None:
        """Note the job of each task."""
        for name, job in zip(names, jobs, strict=True):
            self._tasks[name] = replace(self._known(name), job=job)
        self.write()

    def _known(self, name: str) -> Submitted:
        return self._tasks.get(name, Submitted(name, name))

    def write(self) -> None:
        """Write the record to disk."""
        write_tasks(self._path, self._tasks.values())

    def jobs(self, *kinds: str) -> list[str]:
        """Return the ids of the jobs of these kinds."""
        return [task.job for task in self._tasks.values() if task.job and task.kind in kinds]


def new_token() -> str:
    """Return a name for a record; names sort by time."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


def record_path(run: RunPaths, token: str) -> Path:
    """Return the path of the record with that name."""
    return run.submitted / f"{token}.json"


def write_tasks(path: Path, tasks: Iterable[Submitted]) -> None:
    """Write the record of a submission."""
    write_json(path, {"token": path.stem, "tasks": [asdict(task) for task in tasks]})


def submissions(run: RunPaths) -> Iterator[Submitted]:
    """Yield the tasks of all submission records, oldest first."""
    for path in json_files(run.submitted):
        yield from _tasks_of(path)


def _tasks_of(path: Path) -> list[Submitted]:
    try:
        return [
            Submitted(**{**task, "cells": tuple(task["cells"]), "needs": tuple(task["needs"])})
            for task in read_json(path)["tasks"]
        ]
    # damaged, or no such record: its tasks are found by their files
    except (Damaged, FileNotFoundError, KeyError, TypeError):
        return []


def deferred_stages(submitted: Iterable[Submitted]) -> tuple[str, ...]:
    """Return the stages that their last submission deferred, unless the whole grid was cancelled
    since. submitted: the tasks of all records, oldest first."""
    deferred: dict[str, bool] = {}
    for task in submitted:
        if task.task == CANCEL:
            deferred.clear()
        elif task.kind not in (BUNDLE, PRETRAIN, CANCEL):
            deferred[task.kind] = bool(task.deferred)
    return tuple(stage for stage, waits in deferred.items() if waits)


def is_lost(task: Submitted) -> bool:
    """Return whether the submission of a task ended before it noted the job."""
    return bool(task.token) and not task.job


def recall(tasks: Iterable[Submitted], queue: Queue) -> list[Submitted]:
    """Return `tasks`, the lost ones with the jobs that the queue knows by their tokens. The queue
    is not asked if no task is lost."""
    known = list(tasks)
    tokens = {task.token for task in known if is_lost(task)}
    found = queue.find_by_token(tokens) if tokens else {}
    return [replace(t, job=found[t.token].get(t.element, "")) if is_lost(t) else t for t in known]


def settle(run: RunPaths, recalled: Iterable[Submitted]) -> None:
    """Write the jobs of lost tasks into their records, or that they have none, so that the queue
    is not asked again. The caller holds the lock of the run directory."""
    by_record: dict[str, dict[tuple[str, int], Submitted]] = {}
    for task in recalled:
        of_record = by_record.setdefault(task.token.rpartition("-")[0], {})
        of_record[task.token, task.element] = task if task.job else replace(task, token="")
    for token, known in by_record.items():
        path = record_path(run, token)
        if tasks := [known.get((t.token, t.element), t) for t in _tasks_of(path)]:
            write_tasks(path, tasks)


def cancellations(run: RunPaths) -> int:
    """Return how often the whole grid was cancelled."""
    return sum(task.task == CANCEL for task in submissions(run))


def noted_arrays(folder: Path) -> dict[str, list[str]]:
    """Return the array ids of each script (`TOKEN-NAME`), newest first, from notes in `folder`."""
    found: dict[str, list[str]] = {}
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:  # no submissions; or reading their records reports the error
        return {}
    for match in filter(None, map(_NOTE.fullmatch, names)):
        found.setdefault(match["script"], []).append(match["array"])
    return {script: sorted(arrays, key=int, reverse=True) for script, arrays in found.items()}


def submitted_tasks(run: RunPaths, queue: Queue) -> Iterator[Submitted]:
    """Yield the tasks of all records, oldest first, with the jobs that only `queue` remembers. A
    task of a script comes once for each job that it may have become."""
    arrays = noted_arrays(run.submitted)
    for task in recall(submissions(run), queue):
        found = [] if task.job else candidates(task.script, task.element, arrays)
        yield from (replace(task, job=job) for job in reversed(found)) if found else (task,)


def candidates(script: str, element: int, arrays: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the jobs that the element of a script may have become, newest first."""
    return [f"{array}_{element}" for array in arrays.get(script, ())]


def job_of(
    jobs: Sequence[str], alive: Callable[[str], bool], logs: Callable[[str], Sequence[Any]]
) -> str:
    """Return the newest candidate that is alive, or else has logs, or else the newest; "" if there
    is none. The user may have submitted an array with some of its elements only."""
    return next(filter(alive, jobs), "") or next(filter(logs, jobs), "") or next(iter(jobs), "")


def json_files(folder: Path) -> list[Path]:
    """Return the JSON files of a folder in order; none if there is no folder.

    Raises:
        UserError: The folder cannot be listed; its files must not be taken for missing.
    """
    try:
        found = (path for path in folder.iterdir() if path.suffix == ".json")
        return sorted(found, key=lambda path: path.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"cannot list {folder}: {error.strerror}; it should be a folder that you may read"
        ) from error
