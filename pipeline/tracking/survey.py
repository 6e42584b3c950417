"""The state of every cell of a grid, as a pure function of a snapshot."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hpc.scheduler.base import NO_RUNNER, JobState, Queue
from hpc.scheduler.exit_cause import ExitCause
from jobs.spec.cell import Cell
from pipeline.config.grid_file import Grid
from pipeline.tracking.finished import garbage_collection_paused
from pipeline.tracking.outcomes import Failure, blocker, cells_at_most, failures, granted
from pipeline.tracking.snapshot import FAILURES, Heartbeat, Snapshot, read_snapshot
from pipeline.tracking.stale import WHY, Stale
from pipeline.tracking.submissions import CANCEL, PRETRAIN, Submitted, deferred_stages

State = Literal[
    "done", "failed", "running", "waiting", "interrupted", "missing", "stale", "unknown"
]
STATES: tuple[State, ...] = (
    "done", "running", "waiting", "interrupted", "failed", "missing", "stale", "unknown",
)  # fmt: skip

# A job with one of these exit causes had begun, even if it wrote no heartbeat.
INTERRUPTIONS = ("node failure", "preemption", "time limit", "killed")
NOT_FINITE = "not finite"
# The state of cells whose job was never started, by the exit cause of the job that it needed; any
# other cause makes them "failed".
_NEVER_STARTED: Mapping[str, State] = {
    **dict.fromkeys(INTERRUPTIONS, "interrupted"), "cancelled": "missing"
}  # fmt: skip


@dataclass(frozen=True)
class CellState:
    """The state of one cell.

    Attributes:
        cell: The cell.
        state: `stale` if other data than its data set holds now went into it, see
            `pipeline.tracking.stale`; `unknown` if it was submitted, its heartbeat is old, and the
            queue cannot be asked.
        step: The step of its newest checkpoint or heartbeat.
        total: The number of steps; 0 if not known yet.
        rate: Steps per second.
        why: The reason for the state; "" if there is nothing to say.
        job: Its last job. A waiting cell without a job is deferred to the next submission.
        cause: Why that job ended, as in `hpc.scheduler.exit_cause`, or "not finite"; "" if the
            cell is done or its job has not ended.
    """

    cell: Cell
    state: State
    step: int = 0
    total: int = 0
    rate: float = 0.0
    why: str = ""
    job: str = ""
    cause: str = ""


@dataclass(frozen=True)
class Progress:
    """A job has done `step` of `total` steps (0: not known yet), at `rate` steps per second."""

    step: int
    total: int
    rate: float


@dataclass(frozen=True)
class Survey:
    """The state of a run, for planning and status.

    Attributes:
        cells: The state of each cell, in the order of the grid.
        steps: The step of the newest checkpoint, by signature.
        counts: The counts file of each finished cell, by signature.
        jobs: The state of each job that the queue was asked about.
        active_jobs: The jobs of tasks that wait or run.
        stages: The stage of each job of prep, reduce and report that waits or runs.
        deferred_stages: The stages that the next submission of cells submits.
        pretraining: The job that trains a backbone now, by the backbone's key.
        training_backbones: The progress of these jobs.
        trained_backbones: The keys of the backbones that are trained, from the present data.
        failed: The stages and pre-trainings whose last job failed.
        at_most: The maximum number of cells per job, by signature, see
            `pipeline.tracking.outcomes`.
        recalled: The tasks whose job the queue knows and their record lacks.
        stale: What is set aside before cells are trained again.
        problems: A line for each damaged file.
        unreachable: Why the queue could not be asked; "" if it answered.
    """

    cells: tuple[CellState, ...]
    steps: Mapping[str, int]
    counts: Mapping[str, Path]
    jobs: Mapping[str, JobState]
    active_jobs: frozenset[str]
    stages: Mapping[str, str]
    deferred_stages: tuple[str, ...]
    pretraining: Mapping[str, str]
    training_backbones: Mapping[str, Progress]
    trained_backbones: frozenset[str]
    failed: tuple[Failure, ...]
    at_most: Mapping[str, int]
    recalled: tuple[Submitted, ...]
    stale: Stale
    problems: tuple[str, ...]
    unreachable: str = ""

    @property
    def deferred(self) -> list[Cell]:
        """The cells that the queue had no room for; the next submission submits them."""
        return [c.cell for c in self.cells if c.state == "waiting" and not c.job]

    def fits_memory(self, cell: Cell) -> bool:
        """Return whether a cell may be tried: neither it alone, nor the training of its backbone,
        ran out of memory with the resources that jobs get now."""
        backbone = cell.protocol.weights == "pretrain" and self.at_most.get(cell.backbone_key) == 0
        return not backbone and self.at_most.get(cell.signature) != 0

    @property
    def not_started(self) -> int:
        """The number of jobs that wait in a local queue without a runner."""
        return sum(job.why == NO_RUNNER for job in self.jobs.values())

    def count(self, state: State) -> int:
        """Return the number of cells in `state`."""
        return sum(1 for cell in self.cells if cell.state == state)


@garbage_collection_paused()
def survey(
    grid: Grid,
    queue: Queue,
    also: Iterable[str] = (),
    accounting: bool = False,
    verify: bool = False,
) -> Survey:
    """Return the state of a run; see `read_snapshot` for the arguments and errors."""
    return survey_of(read_snapshot(grid, queue, also, accounting, verify))


def survey_of(seen: Snapshot) -> Survey:
    """Return the state of the run that a snapshot shows."""
    # a checkpoint of other data is no progress
    steps = {cell: c.step for cell, c in seen.checkpoints.items() if cell not in seen.stale.files}
    cells = tuple(map(partial(cell_state, seen, steps), seen.grid.cells))
    pretraining = [task for task in seen.open_tasks if task.kind == PRETRAIN]
    return Survey(
        cells=cells,
        steps=steps,
        counts={
            c.cell.signature: seen.done[c.cell.signature].path for c in cells if c.state == "done"
        },
        jobs=seen.jobs,
        active_jobs=frozenset(task.job for task in seen.active if task.job),
        stages={
            job: task.kind
            for job, task in seen.stages.items()
            if seen.job_state(task).state in ("waiting", "running")
        },
        deferred_stages=deferred_stages(seen.submitted),
        # one that the queue has lost is not waited for, even if its heart still beats
        pretraining={
            task.backbone: task.job for task in pretraining if seen.job_state(task).state != "gone"
        },
        training_backbones={
            task.job: _progress(beat)
            for task in pretraining
            if task in seen.active
            and (beat := seen.heartbeats[task.task])
            and seen.job_state(task).state == "running"
        },
        trained_backbones=seen.trained - seen.stale.backbones,
        failed=failures(seen),
        at_most=cells_at_most(seen.submitted, seen.ended, granted(seen.grid.cluster)),
        recalled=seen.recalled,
        stale=seen.stale,
        problems=seen.problems,
        unreachable=seen.unreachable,
    )


def cell_state(seen: Snapshot, steps: Mapping[str, int], cell: Cell) -> CellState:
    """Return the state of a cell. `steps`: the step of the newest checkpoint, by signature."""
    name, task = cell.signature, seen.latest.get(cell.signature)
    is_stale = name in seen.stale.files
    state = CellState(cell, "missing", step=steps.get(name, 0))
    if name in seen.done:
        return CellState(cell, "stale", why=WHY) if is_stale else replace(state, state="done")
    if is_stale and task not in seen.active:
        return CellState(cell, "stale", why=WHY)
    if name in seen.failures:
        return _not_finite(seen, state, task)
    if task is None:
        return state
    beat = seen.heartbeats[task.task]
    state = replace(state, job=task.job, total=beat.get("total", 0))
    if task in seen.active:
        return _active(seen, replace(state, step=max(state.step, beat.get("step", 0))), task, beat)
    if task.deferred:
        step = max(state.step, beat.get("step", 0))
        return replace(state, state="waiting", step=step, why=task.deferred)
    if task.kind == CANCEL:
        return _ended(replace(state, cause="cancelled"), task, beat, ExitCause("cancelled"))
    end, blocking = _end_of(seen, cell, task)
    state = replace(state, cause=end.cause if task.job else "")
    if blocking:
        cause = blocking.exit_cause.cause
        return replace(
            state, state=_NEVER_STARTED.get(cause, "failed"), why=str(blocking), cause=cause
        )
    return _ended(state, task, beat, end)


def _not_finite(seen: Snapshot, state: CellState, task: Submitted | None) -> CellState:
    record = seen.failures[state.cell.signature]
    reason = record.get("reason", "its record is damaged")
    name = shlex.quote(state.cell.name)
    again = f"python -m pipeline.retry {seen.grid.command_arguments} --cell {name}"
    why = f"{reason}; change its settings, or try again with `{again}`"
    job = task.job if task else ""
    return replace(state, state="failed", why=why, job=job, cause=NOT_FINITE)


def _active(seen: Snapshot, state: CellState, task: Submitted, beat: Heartbeat) -> CellState:
    """Return the state of a cell whose task may work."""
    job = seen.job_state(task)
    if job.why == NO_RUNNER:
        return replace(state, state="interrupted" if state.step else "missing", why=job.why)
    if job.state == "waiting":
        return replace(state, state="waiting", why=job.why)
    if job.state == "unknown" and seen.heart_stopped(task):
        return replace(state, state="unknown", why="its job may wait, run or have ended")
    why = "being cancelled" if task.kind == CANCEL else ""
    return replace(state, state="running", rate=beat.get("steps_per_second", 0.0), why=why)


def _end_of(seen: Snapshot, cell: Cell, task: Submitted) -> tuple[ExitCause, Failure | None]:
    """Return how the job of a cell ended, and the failure that kept it from starting."""
    asked = seen.explaining_task(cell)
    told = next((t for t in (asked, task) if t and t.job in seen.ended), None)
    if told is None:
        return ExitCause("unknown"), None
    end = seen.ended[told.job]
    blocking = blocker(seen, told.job)
    if told is not task and not blocking and end.cause != "unknown":
        blocking = Failure(told.kind, told.job, end)
    return end, blocking


def _ended(state: CellState, task: Submitted, beat: Heartbeat, end: ExitCause) -> CellState:
    """Return the state of a cell whose job ended without finishing it."""
    if end.cause == "dependency failed":
        return replace(state, state="failed", why="a job that it needs failed")
    if end.cause in FAILURES:
        return replace(state, state="failed", why=end.line or end.cause)
    began = beat or end.cause in INTERRUPTIONS
    why: str = "" if end.cause == "unknown" else end.cause
    if task.script and not task.job and not beat:
        why = "its script has not started"
    return replace(state, state="interrupted" if began else "missing", why=why)


def _progress(beat: Mapping[str, Any]) -> Progress:
    return Progress(beat.get("step", 0), beat.get("total", 0), beat.get("steps_per_second", 0.0))
