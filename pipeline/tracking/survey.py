"""What state each cell is in, from its files and one question to the queue. No database: counts,
failures, checkpoints, heartbeats and submission records are all there is."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hpc.scheduler.base import NO_RUNNER, JobState, Queue
from hpc.scheduler.exit_cause import ExitCause
from hpc.storage import checkpoint
from hpc.storage.atomic import Damaged, read_json
from hpc.storage.checkpoint import Checkpoint
from jobs.spec.cell import Cell
from jobs.spec.run_paths import RunPaths
from pipeline.config.grid_file import Grid
from pipeline.tracking.finished import finished_cells, many_records
from pipeline.tracking.outcomes import (
    Failure,
    answerable,
    blocker,
    cells_at_most,
    exit_causes,
    failures,
    granted,
    last_of_each,
    untrained,
)
from pipeline.tracking.script_jobs import candidates, job_of, noted_arrays
from pipeline.tracking.stale import WHY, Stale, failure_record, find_stale
from pipeline.tracking.submissions import (
    BUNDLE,
    CANCEL,
    PRETRAIN,
    Submitted,
    deferred_stages,
    is_lost,
    json_files,
    recall,
    submissions,
)

State = Literal[
    "done", "failed", "running", "waiting", "interrupted", "missing", "stale", "unknown"
]
STATES: tuple[State, ...] = (
    "done", "running", "waiting", "interrupted", "failed", "missing", "stale", "unknown",
)  # fmt: skip

# A job that the queue has forgotten but whose heart beat this recently is still ending.
DEAD_AFTER_SECONDS = 30.0
GONE, UNKNOWN = JobState("gone"), JobState("unknown")
# how a job ends that could not help it, and has begun even if its heart never beat
_INTERRUPTIONS = ("node failure", "preemption", "time limit", "killed")
_FAILURES = ("error", "out of memory")
NOT_FINITE = "not finite"
# the state of cells whose job was never started, by how the job ended that it needed; else "failed"
_NEVER_STARTED: Mapping[str, State] = {
    **dict.fromkeys(_INTERRUPTIONS, "interrupted"), "cancelled": "missing"
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
    """How far a job is: `step` of `total` steps (0: not known yet), at `rate` steps per second."""

    step: int
    total: int
    rate: float


@dataclass(frozen=True)
class Survey:
    """All that planning and status need to know of a run."""

    cells: tuple[CellState, ...]
    steps: Mapping[str, int]  # newest checkpoint by cell signature
    pretraining: Mapping[str, str]  # backbone key -> the job that trains it now
    active_jobs: tuple[str, ...]  # of tasks
    stages: Mapping[str, str]  # jobs of prep, reduce and report that wait or run -> the stage
    counts: Mapping[str, Path]  # the counts file of each done cell by signature
    deferred: tuple[str, ...]  # reduce and report, where the next submission of cells sends them
    failed: tuple[Failure, ...]  # stages and pre-trainings whose last job failed
    training_backbones: Mapping[str, Progress]  # how far the jobs in `pretraining` are
    jobs: Mapping[str, JobState]  # of all that the queue was asked about
    problems: tuple[str, ...]  # lines about damaged files
    at_most: Mapping[
        str, int
    ]  # cells a job may have, by signature, see `pipeline.tracking.outcomes`
    recalled: tuple[Submitted, ...]  # tasks whose record does not tell the job, as the queue does
    stale: Stale  # what is to be set aside before cells are trained anew
    unreachable: str = ""  # why the queue, opened `read_only`, could not be asked

    @property
    def held(self) -> list[Cell]:
        """The cells that the queue had no room for; the next submission is to send them."""
        return [c.cell for c in self.cells if c.state == "waiting" and not c.job]

    def fits(self, cell: Cell) -> bool:
        """Whether it may be tried: neither it alone, nor the training of the backbone that it
        needs, ran out of memory with what jobs get now."""
        backbone = cell.protocol.weights == "pretrain" and self.at_most.get(cell.backbone_key) == 0
        return not backbone and self.at_most.get(cell.signature) != 0

    @property
    def not_started(self) -> int:
        """How many jobs wait in a local queue that has no runner."""
        return sum(job.why == NO_RUNNER for job in self.jobs.values())

    def count(self, state: State) -> int:
        """How many cells are in `state`."""
        return sum(1 for cell in self.cells if cell.state == state)


@many_records()
def survey(
    grid: Grid,
    queue: Queue,
    also: Iterable[str] = (),
    accounting: bool = False,
    verify: bool = False,
) -> Survey:
    """Look at the run directory and ask the queue once, about the jobs `also` too; with
    `accounting`, jobs that have ended nobody knows how are looked up there as well; with `verify`,
    all counts are read and compared with their checksums."""
    done, problems = finished_cells(grid.run, verify)
    recorded = list(submissions(grid.run))
    sent = recall(recorded, queue)
    open_tasks = [t for t in sent if _is_open(t, done, grid.run)]
    by_job = {t.job: t for t in sent if t.job and t.kind != CANCEL}
    stages = {job: t for job, t in by_job.items() if t.kind not in (BUNDLE, PRETRAIN)}
    arrays = noted_arrays(grid.run.submitted)
    asked = {job for task in open_tasks for job in (*_jobs_of(task, arrays), *task.needs)}
    jobs = queue.look(asked.union(stages, also) - {""})
    open_tasks = [_with_job(task, arrays, jobs, queue) for task in open_tasks]
    beats = {task.task: _heartbeat(grid.run, task.task) for task in open_tasks}
    known = {t: _known(t, jobs, beats[t.task], queue) for t in open_tasks}
    active = {t for t in open_tasks if _may_work(t, known[t], beats[t.task], queue)}
    saved = _checkpoints(grid, done)
    signatures = {cell.signature for cell in grid.cells} - done.keys()
    not_finite = {
        path.stem: failure_record(path)
        for path in json_files(grid.run.failures)
        if path.stem in signatures
    }
    stale = find_stale(grid, done, saved, not_finite)
    # a checkpoint of other data is no progress
    steps = {cell: c.step for cell, c in saved.items() if cell not in stale.files}
    # those that work come last: a person may have started an older script than the last written
    by_work = sorted(open_tasks, key=lambda task: task in active)
    latest = {c: task for task in by_work for c in task.cells if task.kind != PRETRAIN}
    waited_for = untrained(grid.run, open_tasks)  # with the jobs that scripts became
    tasks = {c.signature: answerable(c, latest.get(c.signature), waited_for) for c in grid.cells}
    last = last_of_each(grid, stages.values(), waited_for)
    gone = {t.job for t in [*latest.values(), *tasks.values(), *last] if t and t not in active}
    gone |= {job for task in open_tasks for job in task.needs}
    jobs |= {job: _known(task, jobs, {}, queue) for job, task in stages.items()}
    jobs |= {t.job: known[t] for t in open_tasks if t.job}
    ended = exit_causes({job: jobs[job] for job in gone if job in jobs}, queue, accounting)
    blocked = {job: failure for job in gone if (failure := blocker(job, by_job, jobs, ended))}
    states = []
    for cell in grid.cells:
        is_stale = cell.signature in stale.files
        if cell.signature in done:
            finished = CellState(cell, "done", step=steps.get(cell.signature, 0))
            states.append(CellState(cell, "stale", why=WHY) if is_stale else finished)
            continue
        state = CellState(cell, "missing", step=steps.get(cell.signature, 0))
        task, asked_of = latest.get(cell.signature), tasks[cell.signature]
        beat = beats[task.task] if task else {}
        told = next((t for t in (asked_of, task) if t and t.job in ended), None)
        exit_cause = ended[told.job] if told else ExitCause("unknown")
        blocking = blocked.get(told.job) if told else None
        if told and told is not task and not blocking and exit_cause.cause != "unknown":
            blocking = Failure(told.kind, told.job, exit_cause)
        record = not_finite.get(cell.signature)
        failed = "" if record is None else _reason(grid.run.failure(cell.signature), record)
        job = known.get(task, GONE) if task else GONE
        state = _unfinished(state, failed, task, job, task in active, beat, exit_cause, blocking)
        if is_stale and not (task and task in active):
            state = CellState(cell, "stale", why=WHY)
        states.append(state)
    return Survey(
        cells=tuple(states),
        steps=steps,
        # one that the queue has lost is not waited for, even if its heart still beats
        pretraining={
            t.backbone: t.job for t in open_tasks if t.kind == PRETRAIN and known[t].state != "gone"
        },
        active_jobs=tuple(sorted({task.job for task in active if task.job})),
        stages={
            j: t.kind
            for j, t in stages.items()
            if jobs.get(j, GONE).state in ("waiting", "running")
        },
        counts={s.cell.signature: done[s.cell.signature].path for s in states if s.state == "done"},
        deferred=deferred_stages(sent),
        failed=failures(grid, last, jobs, ended, queue),
        training_backbones={
            t.job: _progress(beats[t.task])
            for t in active
            if t.kind == PRETRAIN and beats[t.task] and known[t].state == "running"
        },
        jobs=jobs,
        problems=tuple(problems),
        at_most=cells_at_most(sent, ended, granted(grid.cluster)),
        recalled=tuple(now for was, now in zip(recorded, sent, strict=True) if is_lost(was)),
        stale=stale,
        unreachable=queue.unreachable,
    )


def _progress(beat: Mapping[str, Any]) -> Progress:
    return Progress(beat.get("step", 0), beat.get("total", 0), beat.get("steps_per_second", 0.0))


def _known(
    task: Submitted, jobs: Mapping[str, JobState], beat: Mapping[str, Any], queue: Queue
) -> JobState:
    """Return what the queue, or else the log, knows of a task's job."""
    if queue.unreachable and is_lost(task):
        return UNKNOWN
    job = jobs.get(task.job, GONE)
    if job.state == "unknown" and _heart_stopped(beat):
        last_words = exit_causes({task.job: GONE}, queue)[task.job]
        if last_words.cause in _FAILURES:  # Slurm does not start such a job again
            return GONE
    return job


def _may_work(task: Submitted, job: JobState, beat: Mapping[str, Any], queue: Queue) -> bool:
    """Whether nothing proves that the task's job is dead."""
    if job.state != "gone":
        return True
    return not (_gone_is_certain(task, queue) or _heart_stopped(beat))


def _checkpoints(grid: Grid, done: Collection[str]) -> dict[str, Checkpoint]:
    """The newest checkpoint of each cell by signature, in bundles that are not done."""
    found: dict[str, Checkpoint] = {}
    for key in {cell.bundle_key for cell in grid.cells if cell.signature not in done}:
        found |= checkpoint.newest(grid.run.checkpoints(key))
    return found


def _jobs_of(task: Submitted, arrays: Mapping[str, list[str]]) -> list[str]:
    """The jobs that a task may have become, newest first."""
    return [task.job] if task.job else candidates(task.script, task.element, arrays)


def _with_job(
    task: Submitted, arrays: Mapping[str, list[str]], jobs: Mapping[str, JobState], queue: Queue
) -> Submitted:
    found = _jobs_of(task, arrays)
    return replace(task, job=job_of(found, lambda job: jobs[job].state != "gone", queue.log_files))


def _gone_is_certain(task: Submitted, queue: Queue) -> bool:
    """Of a script's job the queue may know nothing: its site's Slurm may not be the queue here."""
    return queue.gone_is_certain and not (task.script and task.job)


def _is_open(task: Submitted, done: Mapping[str, Any], run: RunPaths) -> bool:
    if task.kind == PRETRAIN:
        return not run.backbone(task.backbone).with_suffix(".json").exists()
    return any(cell not in done for cell in task.cells)


def _heartbeat(run: RunPaths, task: str) -> dict[str, Any]:
    try:
        return read_json(run.progress_of(task))
    except (FileNotFoundError, Damaged):
        return {}


def _reason(path: Path, record: Mapping[str, Any]) -> str:
    """Why a cell stopped for good, by its record at `path`, and how to try it again."""
    reason = record.get("reason", "its record is damaged")
    return f"{reason}; change its settings, or delete {path} to try again"


def _heart_stopped(beat: Mapping[str, Any]) -> bool:
    """The second proof of death, beside being gone from the queue."""
    if beat.get("stage") in ("done", "stopped", None):
        return True
    return time.time() - beat.get("time", 0.0) > DEAD_AFTER_SECONDS


def _unfinished(
    state: CellState,
    failure: str,
    task: Submitted | None,
    job: JobState,
    active: bool,
    beat: Mapping[str, Any],
    exit_cause: ExitCause,
    blocking: Failure | None,
) -> CellState:
    if failure:
        state = replace(state, job=task.job if task else "")
        return replace(state, state="failed", why=failure, cause=NOT_FINITE)
    if task is None:
        return state
    step = max(state.step, beat.get("step", 0))
    known = replace(state, step=step, total=beat.get("total", 0), job=task.job)
    if active:
        if job.why == NO_RUNNER:
            return replace(known, state="interrupted" if step else "missing", why=job.why)
        if job.state == "waiting":
            return replace(known, state="waiting", why=job.why)
        if job.state == "unknown" and _heart_stopped(beat):
            return replace(known, state="unknown", why="its job may wait, run or have ended")
        rate, why = beat.get("steps_per_second", 0.0), "being cancelled"
        why = why if task.kind == CANCEL else ""
        return replace(known, state="running", rate=rate, why=why)
    if task.held:
        return replace(known, state="waiting", why=task.held)
    if task.kind == CANCEL:
        exit_cause = ExitCause("cancelled")
    known = replace(
        known, step=state.step, cause=exit_cause.cause if task.job or task.kind == CANCEL else ""
    )
    if blocking and task.kind != CANCEL:
        cause = blocking.exit_cause.cause
        return replace(
            known, state=_NEVER_STARTED.get(cause, "failed"), why=str(blocking), cause=cause
        )
    if exit_cause.cause == "dependency failed":
        return replace(known, state="failed", why="a job that it needs failed")
    if exit_cause.cause in ("error", "out of memory"):
        return replace(known, state="failed", why=exit_cause.line or exit_cause.cause)
    began = beat or exit_cause.cause in _INTERRUPTIONS
    why = "" if exit_cause.cause == "unknown" else exit_cause.cause
    if task.script and not task.job and not beat:
        why = "its script has not started"
    return replace(known, state="interrupted" if began else "missing", why=why)
