"""Run probe jobs, whose ranks report facts about their nodes, and remove all their files."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.cli import UserError
from hpc.diagnostics.node_facts import FACTS, answer_hellos
from hpc.scheduler.base import JobState, Queue
from hpc.scheduler.cluster_profile import Resources
from hpc.scheduler.exit_cause import exit_cause
from hpc.scheduler.job import START_PREFIX, ModuleCall, is_launchers
from hpc.storage.atomic import TEMPORARY_PREFIX, Damaged, read_json
from hpc.storage.permissions import private_folder

_SHORT_SECONDS = 0.3
_POLL_SECONDS = 2.0  # the longest pause between questions to the queue
_ANSWER_SECONDS = 0.05
_LATE_SECONDS = 10.0  # until a network file system shows a file of a node
_END_SECONDS = 90.0  # for cancelled jobs to end
# Slurm's reasons for which a job waits until the user changes something
_FOREVER = ("BadConstraints", "Held", "held", "Invalid", "NotAllowed", "PartitionNodeLimit",
            "TimeLimit", "PerJob")  # fmt: skip


@dataclass(frozen=True)
class ProbeJob:
    """A probe job; its ranks write their facts under its name."""

    name: str
    call: ModuleCall
    resources: Resources

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.resources.nodes * self.resources.tasks_per_node


@dataclass(frozen=True)
class Report:
    """The report of one probe job.

    Attributes:
        probe: The probe job.
        job: Its job id.
        facts: The facts of its ranks, in order of rank.
        ended: Its exit cause, in words.
        has_log: Its log is visible on this machine.
        set_up: Lines that its setup lines printed.
    """

    probe: ProbeJob
    job: str
    facts: tuple[dict[str, Any], ...]
    ended: str = ""
    has_log: bool = True
    set_up: tuple[str, ...] = ()


@contextmanager
def temporary_folder(parent: Path, group: str) -> Iterator[Path]:
    """Make a private folder in `parent` for the block; then remove it and all new parents."""
    made = [new for new in (parent, *parent.parents) if not new.exists()]
    folder = parent / f"{TEMPORARY_PREFIX}doctor-{uuid.uuid4().hex[:12]}"
    try:
        private_folder(folder, group)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for new in made:
            with suppress(OSError):  # the folder is not empty any more
                new.rmdir()


def run_probe_jobs(
    queue: Queue, probe_jobs: Sequence[ProbeJob], folder: Path, log: Callable[[str], None]
) -> list[Report]:
    """Submit probe jobs and wait until all have ended. An exception, Ctrl-C too, ends the jobs.

    Args:
        queue: Takes the jobs.
        probe_jobs: The jobs.
        folder: The folder in which their ranks write facts.
        log: Takes a line when the state of the jobs changes.

    Returns:
        One report per job.

    Raises:
        UserError: The queue refuses a job, or would keep it waiting forever.
    """
    jobs: list[str] = []
    try:
        for probe in probe_jobs:
            jobs += queue.submit([probe.call], probe.resources, f"doctor-{probe.name}")
        _wait(queue, jobs, folder, log)
    except BaseException:
        _end(queue, jobs)
        raise
    queue.wait_for_runner(_END_SECONDS)
    return [_report(queue, *pair, folder) for pair in zip(probe_jobs, jobs, strict=True)]


def _wait(queue: Queue, jobs: Sequence[str], folder: Path, log: Callable[[str], None]) -> None:
    pause = min(_POLL_SECONDS, queue.poll_seconds)
    due, last_line = 0.0, ""
    while True:
        answer_hellos(folder)
        if time.monotonic() >= due:
            alive = {job: now for job, now in queue.job_states(jobs).items() if now.state != "gone"}
            if not alive:
                return
            _refuse_stuck(alive)
            queue.ensure_runner()
            line = ", ".join(
                f"job {job} is {now.state}{f' ({now.why})' if now.why else ''}"
                for job, now in alive.items()
            )
            if line != last_line:
                log(f"{line}; Ctrl-C ends it")
            last_line, due = line, time.monotonic() + pause
        time.sleep(_ANSWER_SECONDS)


def _refuse_stuck(jobs: Mapping[str, JobState]) -> None:
    for job, now in jobs.items():
        if now.state == "waiting" and any(word in now.why for word in _FOREVER):
            raise UserError(
                f"job {job} would wait forever ({now.why}); see `scontrol show job {job}`, and "
                "fix the profile"
            )


def _end(queue: Queue, jobs: Sequence[str]) -> None:
    """Cancel the jobs and wait until they are gone, since their files are removed next."""
    if not jobs:
        return
    with suppress(UserError):
        queue.cancel(jobs)
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            if all(job.state == "gone" for job in queue.job_states(jobs).values()):
                break
            time.sleep(_SHORT_SECONDS)
    queue.wait_for_runner(_END_SECONDS)


def _report(queue: Queue, probe: ProbeJob, job: str, folder: Path) -> Report:
    deadline = time.monotonic() + _LATE_SECONDS
    while len(facts := _facts(folder, probe.name)) < probe.world_size:
        if time.monotonic() >= deadline:
            break
        time.sleep(_SHORT_SECONDS)
    logs = queue.log_files(job)
    cause, line = exit_cause(queue.job_states([job])[job].why, logs)
    ended = f"{cause}: {line}" if line else cause
    return Report(probe, job, facts, ended, bool(logs), _set_up(logs))


def _facts(folder: Path, name: str) -> tuple[dict[str, Any], ...]:
    found = []
    for path in folder.glob(f"{name}-*.{FACTS}"):
        with suppress(Damaged, FileNotFoundError):
            found.append(read_json(path))
    return tuple(sorted(found, key=lambda facts: facts["rank"]))


def _set_up(logs: Sequence[Path]) -> tuple[str, ...]:
    """Return what the batch script printed before the first rank started."""
    lines = logs[0].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
    starts = [number for number, line in enumerate(lines) if line.startswith(START_PREFIX)]
    first = lines[: starts[0]] if starts else []
    return tuple(line.strip() for line in first if line.strip() and not is_launchers(line))
