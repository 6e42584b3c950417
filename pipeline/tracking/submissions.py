"""The records of submissions: what was to be sent, and which jobs it became. One JSON file a
submission; written before the queue is asked, so that a crash in between leaves a trace, and again
with the ids of the jobs."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpc.cli import UserError
from hpc.scheduler.base import Queue
from hpc.storage.atomic import Damaged, read_json, write_json
from jobs.spec.run_paths import RunPaths
from jobs.spec.task import Task

BUNDLE, PRETRAIN, CANCEL = "bundle", "pretrain", "cancel"


@dataclass(frozen=True)
class Submitted:
    """One task of a submission, or one stage beside training.

    Attributes:
        task: The name of the task, or of the stage.
        kind: The kind of the task, or the name of the stage; "cancel" if the user cancelled it.
        cells: The signatures of its cells.
        backbone: The key of the backbone that it pre-trains.
        job: The job it became; "" if the submission ended before the queue answered.
        held: Why it was deferred to the next submission; "" if it was not.
        script: The batch script that holds it; its job is found by
            `pipeline.tracking.script_jobs`.
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
    held: str = ""
    script: str = ""
    element: int = 0
    granted: str = ""
    at_most: int | None = None
    token: str = ""
    needs: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: Task, **more: Any) -> Submitted:
        """What a task is before it is sent."""
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
        """What the jobs get, and how many cells they may have, by a cell's signature or the key of
        a backbone to be trained; for the tasks that are planned after."""
        self._granted, self._at_most = granted, at_most

    def plan(self, tasks: Sequence[Task], held: Sequence[Task] = (), why: str = "") -> None:
        """Note tasks that are about to be sent, and others that are not, and why."""
        self._tasks |= {task.name: self._planned(task) for task in tasks}
        self._tasks |= {task.name: replace(self._planned(task), held=why) for task in held}
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
        """Note that the jobs of tasks are about to be ended, and that those without one are no
        longer to be sent; `whole`: the whole grid."""
        for task in tasks:
            self._tasks[f"{task.task} {task.job}"] = replace(task, kind=CANCEL, held="")
        if whole:
            self._tasks[CANCEL] = Submitted(CANCEL, CANCEL)
        self.write()

    def defer(self, stages: Iterable[str], why: str) -> None:
        """Note stages that are not sent, or not yet, see `deferred_stages`."""
        self._tasks |= {stage: Submitted(stage, stage, held=why) for stage in stages}
        self.write()

    def sending(self, names: Sequence[str], needs: Sequence[str] = ()) -> str:
        """Note that tasks, which need some jobs to succeed, are about to be sent together; a name
        that was not planned is a stage's. Returns the token to send them with."""
        earlier = {task.token for task in self._tasks.values()} - {""}
        token = f"{self._path.stem}-{len(earlier)}"
        for element, name in enumerate(names):
            self._tasks[name] = replace(
                self._known(name), token=token, element=element, needs=tuple(needs), held=""
            )
        self.write()
        return token

    def sent(self, names: Sequence[str], jobs: Sequence[str]) -> None:
        """Note which jobs tasks became."""
        for name, job in zip(names, jobs, strict=True):
            self._tasks[name] = replace(self._known(name), job=job)
        self.write()

    def _known(self, name: str) -> Submitted:
        return self._tasks.get(name, Submitted(name, name))

    def write(self) -> None:
        """Put it on disk as it is."""
        write_tasks(self._path, self._tasks.values())

    def jobs(self, *kinds: str) -> list[str]:
        """The ids of the jobs of these kinds that were sent."""
        return [task.job for task in self._tasks.values() if task.job and task.kind in kinds]


def new_token() -> str:
    """A name for a record, later than those before."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


def record_path(run: RunPaths, token: str) -> Path:
    """Where the record of that name lies."""
    return run.submitted / f"{token}.json"


def write_tasks(path: Path, tasks: Iterable[Submitted]) -> None:
    """Write the record of a submission."""
    write_json(path, {"token": path.stem, "tasks": [asdict(task) for task in tasks]})


def submissions(run: RunPaths) -> Iterator[Submitted]:
    """What all submission records hold, oldest first."""
    for path in json_files(run.submitted):
        yield from _tasks_of(path)


def _tasks_of(path: Path) -> list[Submitted]:
    try:
        return [
            Submitted(**{**task, "cells": tuple(task["cells"]), "needs": tuple(task["needs"])})
            for task in read_json(path)["tasks"]
        ]
    # damaged, or no such record: what it submitted is found by its files
    except (Damaged, FileNotFoundError, KeyError, TypeError):
        return []


def deferred_stages(sent: Iterable[Submitted]) -> tuple[str, ...]:
    """Return the stages that the last submission which had them did not send; none of those before
    the whole grid was cancelled. sent: what all records hold, oldest first."""
    deferred: dict[str, bool] = {}
    for task in sent:
        if task.task == CANCEL:
            deferred.clear()
        elif task.kind not in (BUNDLE, PRETRAIN, CANCEL):
            deferred[task.kind] = bool(task.held)
    return tuple(stage for stage, waits in deferred.items() if waits)


def is_lost(task: Submitted) -> bool:
    """Whether its submission ended before it could note the job."""
    return bool(task.token) and not task.job


def recall(tasks: Iterable[Submitted], queue: Queue) -> list[Submitted]:
    """`tasks`, the lost ones with the jobs that the queue knows by their tokens; if there are none,
    it is not asked."""
    known = list(tasks)
    tokens = {task.token for task in known if is_lost(task)}
    found = queue.sent_as(tokens) if tokens else {}
    return [replace(t, job=found[t.token].get(t.element, "")) if is_lost(t) else t for t in known]


def settle(run: RunPaths, recalled: Iterable[Submitted]) -> None:
    """Write what became of lost tasks into their records, once nobody else submits: the job, or
    that there is none, so that the queue need not be asked again."""
    by_record: dict[str, dict[tuple[str, int], Submitted]] = {}
    for task in recalled:
        of_record = by_record.setdefault(task.token.rpartition("-")[0], {})
        of_record[task.token, task.element] = task if task.job else replace(task, token="")
    for token, known in by_record.items():
        path = record_path(run, token)
        if tasks := [known.get((t.token, t.element), t) for t in _tasks_of(path)]:
            write_tasks(path, tasks)


def cancellations(run: RunPaths) -> int:
    """How often the whole grid was cancelled."""
    return sum(task.task == CANCEL for task in submissions(run))


def json_files(folder: Path) -> list[Path]:
    """The JSON files of a folder in order; none where there is no folder. Raises `UserError` if it
    cannot be listed: what it holds must not be taken for missing."""
    try:
        found = (path for path in folder.iterdir() if path.suffix == ".json")
        return sorted(found, key=lambda path: path.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"cannot list {folder}: {error.strerror}; it should be a folder that you may read"
        ) from error
