"""How the tasks of a run have ended, and what planning learns of it: how many cells a job may have
where one of more ran out of memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.shards.manifest import MANIFEST
from hpc.scheduler.base import JobState, Queue
from hpc.scheduler.cluster_profile import ClusterProfile
from hpc.scheduler.exit_cause import ExitCause, exit_cause
from jobs.spec.cell import Cell
from jobs.spec.run_paths import RunPaths
from pipeline.config.grid_file import Grid
from pipeline.tracking.stages import PREP, REDUCE, REPORT
from pipeline.tracking.submissions import BUNDLE, CANCEL, PRETRAIN, Submitted

_SUCCEEDED = ("succeeded", "COMPLETED")  # the last words of the queues
_NO_FAILURE = ("unknown", "cancelled", "dependency failed")
_TITLES = {PRETRAIN: "pre-training"}


class Failure(NamedTuple):
    """A stage, or a pre-training, whose job failed. kind: prep, pretrain, reduce or report, as
    `pipeline.logs` takes it."""

    kind: str
    job: str
    exit_cause: ExitCause

    def __str__(self) -> str:
        title = _TITLES.get(self.kind, self.kind)
        return f"{title} failed: {self.exit_cause.line or self.exit_cause.cause}"


def exit_causes(
    jobs: Mapping[str, JobState], queue: Queue, accounting: bool = False
) -> dict[str, ExitCause]:
    """How each of `jobs` that is gone has ended, from the queue's last word and its logs; with
    `accounting`, those that neither explains are looked up there, all by one question."""
    found = {job: exit_cause(j.why, queue.log_files(job)) for job, j in jobs.items() if _is_gone(j)}
    unknown = sorted(job for job in found if found[job].cause == "unknown")
    words = queue.remembered(unknown) if accounting and unknown else {}
    return found | {job: exit_cause(word, queue.log_files(job)) for job, word in words.items()}


def _is_gone(job: JobState) -> bool:
    return job.state == "gone"


def granted(site: ClusterProfile) -> str:
    """What a job of the profile gets, as far as its memory depends on it: a job that ran out of
    memory says nothing about others that get more, or other nodes."""
    keys = ("partition", "constraint", "gres", "nodes", "tasks_per_node", "cpus_per_task",
            "gpus_per_node", "memory_gb", "extra")  # fmt: skip
    given = {key: getattr(site, key) for key in keys}
    return ", ".join(f"{key} {value}" for key, value in given.items() if value)


def cells_at_most(
    sent: Iterable[Submitted], ended: Mapping[str, ExitCause], grant: str
) -> dict[str, int]:
    """How many cells a job of each cell may have, by signature: half of a job that ran out of
    memory, with what jobs are granted now; 0 where a cell did so alone, and, by its key, for a
    backbone whose training did. A later submission keeps it in its record, since logs are deleted
    and a queue forgets."""
    found: dict[str, int] = {}
    for task in sent:
        if task.kind not in (BUNDLE, PRETRAIN) or task.granted != grant:
            continue
        limits = [task.at_most] if task.at_most is not None else []
        if task.job in ended and ended[task.job].cause == "out of memory":
            limits.append(len(task.cells) // 2)
        for name in ([task.backbone] if task.backbone else task.cells) if limits else ():
            found[name] = min([*limits, found.get(name, limits[0])])
    return found


def answerable(
    cell: Cell, task: Submitted | None, untrained: Mapping[str, Submitted]
) -> Submitted | None:
    """Return the task whose exit cause tells why a cell is not done.

    It is the cell's own, or the one that was to train its backbone, see `untrained`."""
    if task is None or task.kind == CANCEL or cell.protocol.weights != "pretrain":
        return task
    return untrained.get(cell.backbone_key, task)


def untrained(run: RunPaths, sent: Iterable[Submitted]) -> dict[str, Submitted]:
    """The last task that was to train each backbone that is not there, by its key."""
    trainers = {task.backbone: task for task in sent if task.backbone and task.job}
    return {
        key: task
        for key, task in trainers.items()
        if not run.backbone(key).with_suffix(".json").exists()
    }


def blocker(
    job: str,
    sent: Mapping[str, Submitted],
    jobs: Mapping[str, JobState],
    ended: Mapping[str, ExitCause],
) -> Failure | None:
    """Return the failure that kept `job` from starting: that of a job which it needed. The queue's
    own word is not enough: Slurm soon forgets."""
    task = sent.get(job)
    for needed in task.needs if task else ():
        known = needed in sent and needed in ended and jobs[needed].why not in _SUCCEEDED
        if known and ended[needed].cause != "unknown":
            return Failure(sent[needed].kind, needed, ended[needed])
    return None


def last_of_each(
    grid: Grid, stages: Iterable[Submitted], trainers: Mapping[str, Submitted]
) -> list[Submitted]:
    """Return the last job of each stage, and those of `trainers` (see `untrained`) whose backbone
    this grid needs."""
    keys = {cell.backbone_key for cell in grid.cells if cell.protocol.weights == "pretrain"}
    by_kind = {task.kind: task for task in stages}
    return [*by_kind.values(), *(task for key, task in trainers.items() if key in keys)]


def not_successful(job: JobState, logs: Sequence[Path]) -> str:
    """Return why a job that is gone did not do its work: the line or the cause. "" if it did, or if
    neither the queue nor the logs tell."""
    found = exit_cause(job.why, logs)
    unknown = job.why in _SUCCEEDED or found.cause == "unknown"
    return "" if unknown else found.line or found.cause


def failures(
    grid: Grid,
    last: Sequence[Submitted],
    jobs: Mapping[str, JobState],
    ended: Mapping[str, ExitCause],
    queue: Queue,
) -> tuple[Failure, ...]:
    """Return those of the `last` jobs that failed, and whose work nobody has done since."""
    found = [
        Failure(task.kind, task.job, ended[task.job])
        for task in last
        if task.job in ended
        and ended[task.job].cause not in _NO_FAILURE
        and jobs[task.job].why not in _SUCCEEDED
    ]
    return tuple(f for f in found if not _made_since(grid, f.kind, queue.log_files(f.job)))


def _made_since(grid: Grid, kind: str, logs: Sequence[Path]) -> bool:
    """Return whether what a stage makes is newer than the logs of its failed job."""
    products = {
        PREP: [Path(settings.shards) / MANIFEST for settings in grid.datasets.values()],
        REDUCE: [grid.run.results],
        REPORT: [grid.run.page],
    }.get(kind, [])
    made, said = [modified(path) for path in products], [modified(path) for path in logs]
    return bool(made and said) and min(made) > 0 and max(made) > max(said)


def modified(path: Path) -> float:
    """Return when a file was last written, in seconds; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
