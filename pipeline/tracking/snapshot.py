"""Read a run directory, and ask the queue once, into one frozen snapshot.

The files are counts, failures, checkpoints, heartbeats and submission records.
`pipeline.tracking.survey` turns a snapshot into the state of every cell.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.shards.manifest import MANIFEST
from hpc.scheduler.base import JobState, Queue
from hpc.scheduler.exit_cause import ExitCause, exit_cause
from hpc.storage import checkpoint
from hpc.storage.atomic import Damaged, read_json
from hpc.storage.checkpoint import Checkpoint
from jobs.spec.cell import Cell
from jobs.spec.counts_file import CountsIndex
from jobs.spec.run_paths import RunPaths
from pipeline.config.grid_file import Grid
from pipeline.tracking.finished import finished_cells, garbage_collection_paused
from pipeline.tracking.stale import Stale, failure_record, find_stale
from pipeline.tracking.submissions import (
    BUNDLE,
    CANCEL,
    PREP,
    PRETRAIN,
    REDUCE,
    REPORT,
    Submitted,
    candidates,
    is_lost,
    job_of,
    json_files,
    noted_arrays,
    recall,
    submissions,
)

# A job that the queue has forgotten may still be ending if its heartbeat is this recent.
DEAD_AFTER_SECONDS = 30.0
GONE, UNKNOWN = JobState("gone"), JobState("unknown")
FAILURES = ("error", "out of memory")  # causes after which Slurm does not start a job again

Heartbeat = Mapping[str, Any]  # the record of a heartbeat; empty if there is none


@dataclass(frozen=True)
class Snapshot:
    """The files of a run, and the answer of its queue, at one moment.

    Attributes:
        time: The moment, in seconds since the epoch.
        done: The index of the counts of each finished cell, by signature.
        trained: The keys of the backbones that are pre-trained.
        checkpoints: The newest checkpoint of each cell that is not done, by signature.
        failures: The record of each cell whose loss was not finite, by signature.
        stale: The files of stale cells.
        submitted: The tasks of all submission records, oldest first.
        recalled: Tasks of `submitted` whose record lacks the job; the queue knows it.
        open_tasks: The tasks whose work is not done, with their jobs.
        stages: The jobs of prep, reduce and report.
        heartbeats: The last heartbeat of each open task, by its name.
        jobs: The state of each job that the queue was asked about.
        ended: The exit cause of each job that is gone and that a state depends on.
        redone: The jobs of stages whose products are newer than their logs.
        certain: The jobs that have no process left if they are gone.
        unreachable: Why the queue could not be asked; "" if it answered.
        problems: A line for each damaged file.
    """

    grid: Grid
    time: float
    done: Mapping[str, CountsIndex]
    trained: frozenset[str]
    checkpoints: Mapping[str, Checkpoint]
    failures: Mapping[str, Mapping[str, Any]]
    stale: Stale
    submitted: tuple[Submitted, ...]
    recalled: tuple[Submitted, ...]
    open_tasks: tuple[Submitted, ...]
    stages: Mapping[str, Submitted]
    heartbeats: Mapping[str, Heartbeat]
    jobs: Mapping[str, JobState]
    ended: Mapping[str, ExitCause]
    redone: frozenset[str]
    certain: frozenset[str]
    unreachable: str
    problems: tuple[str, ...]

    @cached_property
    def by_job(self) -> Mapping[str, Submitted]:
        """The task or stage of each recorded job that was not cancelled."""
        return {task.job: task for task in self.submitted if task.job and task.kind != CANCEL}

    def job_state(self, task: Submitted) -> JobState:
        """Return the state of the job of a task."""
        lost = self.unreachable and is_lost(task)
        return UNKNOWN if lost else self.jobs.get(task.job, GONE)

    def heart_stopped(self, task: Submitted) -> bool:
        """Return whether the heartbeat of a task says that it ended, or is old."""
        return _heart_stopped(self.heartbeats.get(task.task, {}), self.time)

    @cached_property
    def active(self) -> frozenset[Submitted]:
        """The open tasks whose jobs nothing proves dead."""
        return frozenset(task for task in self.open_tasks if not self._is_dead(task))

    def _is_dead(self, task: Submitted) -> bool:
        if self.job_state(task).state != "gone":
            return False
        return task.job in self.certain or self.heart_stopped(task)

    @cached_property
    def latest(self) -> Mapping[str, Submitted]:
        """The last task of each cell, by signature. Tasks that work come last, since the user may
        have started an older script than the last written."""
        by_work = sorted(self.open_tasks, key=lambda task: task in self.active)
        return {cell: task for task in by_work for cell in task.cells if task.kind != PRETRAIN}

    @cached_property
    def trainers(self) -> Mapping[str, Submitted]:
        """The last pre-training of each backbone that is not trained, by key."""
        tasks = {task.backbone: task for task in self.open_tasks if task.backbone and task.job}
        return {key: task for key, task in tasks.items() if key not in self.trained}

    def explaining_task(self, cell: Cell) -> Submitted | None:
        """Return the task whose end explains why a cell is not done: its own, or the pre-training
        of its backbone."""
        task = self.latest.get(cell.signature)
        if task is None or task.kind == CANCEL or cell.protocol.weights != "pretrain":
            return task
        return self.trainers.get(cell.backbone_key, task)

    @cached_property
    def last_of_each(self) -> Sequence[Submitted]:
        """The last job of each stage, and of each pre-training that the grid needs."""
        pretrained = [cell for cell in self.grid.cells if cell.protocol.weights == "pretrain"]
        keys = {cell.backbone_key for cell in pretrained}
        by_kind = {task.kind: task for task in self.stages.values()}
        return [*by_kind.values(), *(task for k, task in self.trainers.items() if k in keys)]

    @cached_property
    def to_explain(self) -> frozenset[str]:
        """The jobs whose exit causes the states depend on, if they are gone."""
        tasks = [
            *self.latest.values(),
            *map(self.explaining_task, self.grid.cells),
            *self.last_of_each,
        ]
        ended = {task.job for task in tasks if task and task not in self.active}
        return frozenset(ended.union(*(task.needs for task in self.open_tasks)))


@garbage_collection_paused()
def read_snapshot(
    grid: Grid,
    queue: Queue,
    also: Iterable[str] = (),
    accounting: bool = False,
    verify: bool = False,
) -> Snapshot:
    """Read the run directory of `grid` and ask the queue.

    Args:
        also: Jobs to ask about beside those of the run.
        accounting: Look up in the accounting how jobs ended that neither queue nor logs explain.
        verify: Compare all counts with their checksums, not only with their sizes.

    Raises:
        QueueUnreachable: The queue does not answer and was not opened `read_only`.
    """
    run = grid.run
    done, problems = finished_cells(run, verify)
    recorded = list(submissions(run))
    submitted = recall(recorded, queue)
    trained = _trained(run, grid, submitted)
    open_tasks = [task for task in submitted if _is_open(task, done, trained)]
    known = {task.job: task for task in submitted if task.job and task.kind != CANCEL}
    stages = {job: task for job, task in known.items() if task.kind not in (BUNDLE, PRETRAIN)}
    arrays = noted_arrays(run.submitted)
    asked = {job for task in open_tasks for job in (*_jobs_of(task, arrays), *task.needs)}
    jobs = queue.job_states(asked.union(stages, also) - {""})
    open_tasks = [_with_job(task, arrays, jobs, queue) for task in open_tasks]
    heartbeats = {task.task: _heartbeat(run, task.task) for task in open_tasks}
    checkpoints, failures = _checkpoints(grid, done), _failures(grid, done)
    now = time.time()
    seen = Snapshot(
        grid=grid,
        time=now,
        done=done,
        trained=trained,
        checkpoints=checkpoints,
        failures=failures,
        stale=find_stale(grid, done, checkpoints, failures),
        submitted=tuple(submitted),
        recalled=tuple(new for old, new in zip(recorded, submitted, strict=True) if is_lost(old)),
        open_tasks=tuple(open_tasks),
        stages=stages,
        heartbeats=heartbeats,
        jobs=jobs | _failed_by_log([*open_tasks, *stages.values()], jobs, heartbeats, queue, now),
        ended={},
        redone=frozenset(),
        certain=frozenset(filter(queue.gone_is_certain, {*jobs, ""})),
        unreachable=queue.unreachable,
        problems=tuple(problems),
    )
    gone = {job: seen.jobs[job] for job in seen.to_explain if job in seen.jobs}
    ended = _exit_causes(gone, queue, accounting)
    last = [task for task in seen.last_of_each if task.job in ended]
    redone = {task.job for task in last if _is_redone(grid, task.kind, queue.log_files(task.job))}
    return replace(seen, ended=ended, redone=frozenset(redone))


def _exit_causes(
    jobs: Mapping[str, JobState], queue: Queue, accounting: bool = False
) -> dict[str, ExitCause]:
    """Return the exit cause of each job that is gone, by the queue's last word and the logs."""
    gone = {job: known for job, known in jobs.items() if known.state == "gone"}
    found = {job: exit_cause(known.why, queue.log_files(job)) for job, known in gone.items()}
    unknown = sorted(job for job in found if found[job].cause == "unknown")
    words = queue.final_states(unknown) if accounting and unknown else {}
    return found | {job: exit_cause(word, queue.log_files(job)) for job, word in words.items()}


def _failed_by_log(
    tasks: Iterable[Submitted],
    jobs: Mapping[str, JobState],
    heartbeats: Mapping[str, Heartbeat],
    queue: Queue,
    now: float,
) -> dict[str, JobState]:
    """Return the jobs whose state an unreachable queue does not tell, but whose logs say that they
    failed."""
    silent = [
        task.job
        for task in tasks
        if jobs.get(task.job, GONE).state == "unknown"
        and _heart_stopped(heartbeats.get(task.task, {}), now)
    ]
    causes = _exit_causes(dict.fromkeys(silent, GONE), queue)
    return {job: GONE for job in silent if causes[job].cause in FAILURES}


def _heart_stopped(beat: Heartbeat, now: float) -> bool:
    if beat.get("stage") in ("done", "stopped", None):
        return True
    return bool(now - beat.get("time", 0.0) > DEAD_AFTER_SECONDS)


def _heartbeat(run: RunPaths, task: str) -> Heartbeat:
    try:
        return read_json(run.progress_of(task))
    except (FileNotFoundError, Damaged):
        return {}


def _trained(run: RunPaths, grid: Grid, submitted: Iterable[Submitted]) -> frozenset[str]:
    keys = {cell.backbone_key for cell in grid.cells if cell.protocol.weights == "pretrain"}
    keys |= {task.backbone for task in submitted if task.backbone}
    return frozenset(key for key in keys if run.backbone(key).with_suffix(".json").exists())


def _is_open(task: Submitted, done: Collection[str], trained: Collection[str]) -> bool:
    if task.kind == PRETRAIN:
        return task.backbone not in trained
    return any(cell not in done for cell in task.cells)


def _checkpoints(grid: Grid, done: Collection[str]) -> dict[str, Checkpoint]:
    found: dict[str, Checkpoint] = {}
    for key in {cell.bundle_key for cell in grid.cells if cell.signature not in done}:
        found |= checkpoint.newest(grid.run.checkpoints(key))
    return found


def _failures(grid: Grid, done: Collection[str]) -> dict[str, Mapping[str, Any]]:
    signatures = {cell.signature for cell in grid.cells}.difference(done)
    paths = {path.stem: path for path in json_files(grid.run.failures)}
    return {name: failure_record(paths[name]) for name in paths if name in signatures}


def _jobs_of(task: Submitted, arrays: Mapping[str, list[str]]) -> list[str]:
    """Return the jobs that a task may have become, newest first."""
    return [task.job] if task.job else candidates(task.script, task.element, arrays)


def _with_job(
    task: Submitted, arrays: Mapping[str, list[str]], jobs: Mapping[str, JobState], queue: Queue
) -> Submitted:
    found = _jobs_of(task, arrays)
    return replace(task, job=job_of(found, lambda job: jobs[job].state != "gone", queue.log_files))


def _is_redone(grid: Grid, kind: str, logs: Sequence[Path]) -> bool:
    """Return whether the products of a stage are newer than the logs of its job."""
    products = {
        PREP: [Path(settings.shards) / MANIFEST for settings in grid.datasets.values()],
        REDUCE: [grid.run.results],
        REPORT: [grid.run.page],
    }.get(kind, [])
    made, written = [modified(path) for path in products], [modified(path) for path in logs]
    return bool(made and written) and min(made) > 0 and max(made) > max(written)


def modified(path: Path) -> float:
    """Return when a file was last written, in seconds since the epoch; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
