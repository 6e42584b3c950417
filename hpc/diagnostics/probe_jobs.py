"""Jobs whose ranks only tell what they see: sent through the queue as any other, waited for, and
gone without a trace."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.cli import UserError
from hpc.diagnostics.node_facts import FACTS, answer_hellos
from hpc.scheduler.base import Queue, QueueUnreachable
from hpc.scheduler.cluster_profile import Resources
from hpc.scheduler.exit_cause import exit_cause
from hpc.scheduler.job import START_PREFIX, ModuleCall, is_launchers
from hpc.storage.atomic import TEMPORARY_PREFIX, Damaged, read_json
from hpc.storage.permissions import private_folder

_SHORT_SECONDS, _LOOK_SECONDS = 0.3, 2.0  # the longest between questions to the queue
_ANSWER_SECONDS = 0.05
_LATE_SECONDS = 10.0  # by which a network file system shows what a node has written
_END_SECONDS = 90.0  # what cancelled jobs get to end
# Slurm's reasons for which a job waits until somebody does something
_FOR_EVER = ("BadConstraints", "Held", "held", "Invalid", "NotAllowed", "NodeLimit", "TimeLimit",
            "PerJob")  # fmt: skip


@dataclass(frozen=True)
class ProbeJob:
    """A job of ours; its ranks leave their facts under its name."""

    name: str
    call: ModuleCall
    resources: Resources

    @property
    def world_size(self) -> int:
        """How many ranks it has."""
        return self.resources.nodes * self.resources.tasks_per_node


@dataclass(frozen=True)
class Report:
    """Return of one probe job: the facts of its ranks, in order; how its job ended, in words;
    and what its set-up lines wrote. `has_log` False: nothing of the job reached this machine."""

    probe: ProbeJob
    job: str
    facts: tuple[dict[str, Any], ...]
    ended: str = ""
    has_log: bool = True
    set_up: tuple[str, ...] = ()


@contextmanager
def passing_folder(parent: Path, group: str) -> Iterator[Path]:
    """A private folder in `parent` that is gone after the block, with all that had to be made for
    it."""
    made = [place for place in (parent, *parent.parents) if not place.exists()]
    folder = parent / f"{TEMPORARY_PREFIX}doctor-{uuid.uuid4().hex[:12]}"
    try:
        private_folder(folder, group)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for place in made:
            with suppress(OSError):  # somebody has put something there meanwhile
                place.rmdir()


def run_probe_jobs(
    queue: Queue, probe_jobs: Sequence[ProbeJob], folder: Path, say: Callable[[str], None]
) -> list[Report]:
    """Send them, and wait until all have ended; `say` hears what is waited for. Whatever stops the
    waiting, Ctrl-C too, ends the jobs. Raises `UserError` if the queue refuses one, or would keep
    it for ever."""
    jobs: list[str] = []
    try:
        for probe in probe_jobs:
            jobs += queue.submit([probe.call], probe.resources, f"doctor-{probe.name}")
        _wait(queue, jobs, folder, say)
    except BaseException:
        _end(queue, jobs)
        raise
    queue.let_runner_leave(_END_SECONDS)
    return [_report(queue, *pair, folder) for pair in zip(probe_jobs, jobs, strict=True)]


def _wait(queue: Queue, jobs: Sequence[str], folder: Path, say: Callable[[str], None]) -> None:
    pause = min(_LOOK_SECONDS, queue.poll_seconds)
    due, said = 0.0, ""
    while True:
        answer_hellos(folder)
        if time.monotonic() >= due:
            states = queue.look(jobs)
            alive = {job: state for job, state in states.items() if state.state != "gone"}
            if not alive:
                return
            for job, state in alive.items():
                if state.state == "waiting" and any(word in state.why for word in _FOR_EVER):
                    raise UserError(
                        f"job {job} would wait for ever ({state.why}); see `scontrol show job "
                        f"{job}`, and mend the profile"
                    )
            queue.ensure_runner()
            line = ", ".join(
                f"job {job} is {state.state}{f' ({state.why})' if state.why else ''}"
                for job, state in alive.items()
            )
            if line != said:
                say(f"{line}; Ctrl-C ends it")
            said, due = line, time.monotonic() + pause
        time.sleep(_ANSWER_SECONDS)


def _end(queue: Queue, jobs: Sequence[str]) -> None:
    """Cancel what was sent, and see it gone: its files are removed next."""
    if not jobs:
        return
    with suppress(QueueUnreachable):
        queue.cancel(jobs)
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            if set(queue.states(jobs).values()) == {"gone"}:
                break
            time.sleep(_SHORT_SECONDS)
    queue.let_runner_leave(_END_SECONDS)


def _report(queue: Queue, probe: ProbeJob, job: str, folder: Path) -> Report:
    deadline = time.monotonic() + _LATE_SECONDS
    while len(facts := _facts(folder, probe.name)) < probe.world_size:
        if time.monotonic() >= deadline:
            break
        time.sleep(_SHORT_SECONDS)
    logs = queue.log_files(job)
    how = exit_cause(queue.look([job])[job].why, logs)
    ended = f"{how.cause}: {how.line}" if how.line else how.cause
    return Report(probe, job, facts, ended, bool(logs), _set_up(logs))


def _facts(folder: Path, name: str) -> tuple[dict[str, Any], ...]:
    found = []
    for path in folder.glob(f"{name}-*.{FACTS}"):
        with suppress(Damaged, FileNotFoundError):
            found.append(read_json(path))
    return tuple(sorted(found, key=lambda facts: facts["rank"]))


def _set_up(logs: Sequence[Path]) -> tuple[str, ...]:
    """What came before the first rank's start: the words of the batch script."""
    lines = logs[0].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
    starts = [number for number, line in enumerate(lines) if line.startswith(START_PREFIX)]
    first = lines[: starts[0]] if starts else []
    return tuple(line.strip() for line in first if line.strip() and not is_launchers(line))
