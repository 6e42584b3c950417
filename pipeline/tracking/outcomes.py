"""Judge how jobs ended: failures, and the number of cells that a job may have. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpc.scheduler.base import JobState
from hpc.scheduler.cluster_profile import ClusterProfile
from hpc.scheduler.exit_cause import ExitCause, exit_cause
from pipeline.tracking.submissions import BUNDLE, PRETRAIN, Submitted

if TYPE_CHECKING:
    from pipeline.tracking.snapshot import Snapshot

_SUCCEEDED = ("succeeded", "COMPLETED")  # the last words of the queues
_NO_FAILURE = ("unknown", "cancelled", "dependency failed")
_TITLES = {PRETRAIN: "pre-training"}


class Failure(NamedTuple):
    """A failed job of a stage or a pre-training. kind: prep, pretrain, reduce or report, as
    `pipeline.logs` takes it."""

    kind: str
    job: str
    exit_cause: ExitCause

    def __str__(self) -> str:
        title = _TITLES.get(self.kind, self.kind)
        return f"{title} failed: {self.exit_cause.line or self.exit_cause.cause}"


def granted(site: ClusterProfile) -> str:
    """Return the resources of a job on which its memory depends, in words. A job that ran out of
    memory says nothing about jobs that get more, or other nodes."""
    keys = ("partition", "constraint", "gres", "nodes", "tasks_per_node", "cpus_per_task",
            "gpus_per_node", "memory_gb", "extra")  # fmt: skip
    given = {key: getattr(site, key) for key in keys}
    return ", ".join(f"{key} {value}" for key, value in given.items() if value)


def cells_at_most(
    submitted: Iterable[Submitted], ended: Mapping[str, ExitCause], grant: str
) -> dict[str, int]:
    """Return the maximum number of cells per job, by signature, after jobs ran out of memory.

    It is half of a job that ran out of memory with the resources `grant`, and 0 for a cell that did
    so alone. A backbone whose training did so has 0, by its key. The next submission keeps these
    numbers in its record, since logs are deleted and queues forget.
    """
    found: dict[str, int] = {}
    for task in submitted:
        if task.kind not in (BUNDLE, PRETRAIN) or task.granted != grant:
            continue
        limits = [task.at_most] if task.at_most is not None else []
        if task.job in ended and ended[task.job].cause == "out of memory":
            limits.append(len(task.cells) // 2)
        for name in ([task.backbone] if task.backbone else task.cells) if limits else ():
            found[name] = min([*limits, found.get(name, limits[0])])
    return found


def blocker(seen: Snapshot, job: str) -> Failure | None:
    """Return the failure that kept `job` from starting: that of a job which it needed. The queue's
    own word is not enough, since Slurm soon forgets."""
    task = seen.by_job.get(job)
    for needed in task.needs if task else ():
        failed = (
            needed in seen.by_job
            and needed in seen.ended
            and seen.ended[needed].cause != "unknown"
            and seen.jobs[needed].why not in _SUCCEEDED
        )
        if failed:
            return Failure(seen.by_job[needed].kind, needed, seen.ended[needed])
    return None


def not_successful(job: JobState, logs: Sequence[Path]) -> str:
    """Return why a job that is gone did not do its work: its error line or the exit cause. "" if it
    succeeded, or if neither the queue nor the logs tell."""
    found = exit_cause(job.why, logs)
    unknown = job.why in _SUCCEEDED or found.cause == "unknown"
    return "" if unknown else found.line or found.cause


def failures(seen: Snapshot) -> tuple[Failure, ...]:
    """Return the stages and pre-trainings whose last job failed, and whose work is not redone."""
    return tuple(
        Failure(task.kind, task.job, seen.ended[task.job])
        for task in seen.last_of_each
        if task.job in seen.ended
        and task.job not in seen.redone
        and seen.ended[task.job].cause not in _NO_FAILURE
        and seen.jobs[task.job].why not in _SUCCEEDED
    )
