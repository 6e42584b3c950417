"""The files of the local queue, and the processes behind them.

A job is a ticket: `ID.json` says what to do, `ID.started` and `ID.ended` appear once each, so a job
starts at most once, whatever dies in between. All processes of a job inherit the open and locked
`ID.lock` as standard input, and the kernel frees the lock with the last of them: so it tells
whether a job lives even if its runner was killed, process ids were reused, or another host asks.
"""

from __future__ import annotations

import fcntl
import os
import pickletools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from hpc.cli import UserError
from hpc.scheduler.base import JobState, Outcome, State
from hpc.storage.atomic import Damaged, read_json, write_json
from hpc.storage.locks import take_lock
from hpc.storage.permissions import private_folder


class Tickets:
    """The files of one queue. What changes them takes `locked`. Nobody but the user, or `group`,
    may write to them: a ticket is a command."""

    def __init__(self, folder: Path, group: str = "") -> None:
        self.folder = folder
        self.group = group

    def path(self, job_id: str, kind: str) -> Path:
        """The file of a kind: json, started, ended, cancelled or lock."""
        return self.folder / f"{job_id}.{kind}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else adds, starts, cancels or ends a job meanwhile."""
        private_folder(self.folder, self.group)
        with self._lock_file("tickets.lock") as file:
            take_lock(file, wait=True)
            yield

    @contextmanager
    def runner_lock(self) -> Iterator[IO[str] | None]:
        """The lock of the one runner, or None if there is a runner already."""
        with self._lock_file("lock") as file:
            yield file if take_lock(file) else None

    def has_runner(self) -> bool:
        """Return whether a process starts the waiting jobs. Changes nothing; True if the files
        cannot be read."""
        try:
            with (
                (self.folder / "tickets.lock").open() as guard,
                (self.folder / "lock").open() as lock,
            ):
                take_lock(guard, fcntl.LOCK_SH, wait=True)  # nobody becomes the runner meanwhile
                return not take_lock(lock, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def _lock_file(self, name: str) -> IO[str]:
        path = self.folder / name
        try:
            return path.open("a")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; make room or mend permissions, run again"
            ) from error

    def add(self, tickets: Sequence[dict[str, Any]], token: str = "") -> list[str]:
        """Queue jobs; their ids. By `token` they are found again."""
        numbers = [int(file.stem.removeprefix("local-")) for file in self.folder.glob("*.json")]
        first = max(numbers, default=0) + 1
        ids = [f"local-{number:06d}" for number in range(first, first + len(tickets))]
        for element, (job_id, ticket) in enumerate(zip(ids, tickets, strict=True)):
            write_json(self.path(job_id, "json"), {**ticket, "token": token, "element": element})
        return ids

    def sent_as(self, tokens: Iterable[str]) -> dict[str, dict[int, str]]:
        """The jobs that were added with some tokens, by token and their place among those."""
        found: dict[str, dict[int, str]] = {token: {} for token in tokens}
        for path in self.folder.glob("*.json"):
            with suppress(Damaged, FileNotFoundError):
                ticket = read_json(path)
                if ticket.get("token") in found:
                    found[ticket["token"]][ticket["element"]] = path.stem
        return found

    def gpus(self, job_id: str) -> list[str]:
        """The GPUs that a started job was given."""
        return read_json(self.path(job_id, "started"))["gpus"]

    def end(self, job_id: str, outcome: Outcome) -> None:
        """Record that a job has ended, and how."""
        write_json(self.path(job_id, "ended"), {"outcome": outcome, "time": time.time()})

    def open_ids(self) -> list[str]:
        """The jobs without an end record, in order."""
        names = {file.name for file in self.folder.iterdir()}
        ids = {name.removesuffix(".json") for name in names if name.endswith(".json")}
        return sorted(job_id for job_id in ids if f"{job_id}.ended" not in names)

    def state(self, job_id: str) -> State:
        """What a job does. A running one whose processes have all died is gone."""
        if self.path(job_id, "ended").exists() or not self.path(job_id, "json").exists():
            return "gone"
        if not self.path(job_id, "started").exists():
            return "waiting"
        with self.path(job_id, "lock").open() as file:
            return "gone" if take_lock(file, fcntl.LOCK_SH) else "running"

    def look(self, job_id: str) -> JobState:
        """Its state; of one that has ended also its outcome: `cancelled` where that was asked for,
        even if the job then ended well."""
        state = self.state(job_id)
        if state != "gone":
            return JobState(state)
        outcome = self.outcome(job_id)
        return JobState(state, "" if outcome == "unknown" else outcome)

    def outcome(self, job_id: str) -> str:
        """Return how a job has ended: an `Outcome`; "unknown" if there is no such job or its record
        is damaged; "" if that is not recorded yet. A job that was cancelled counts as cancelled
        even if it ended well."""
        if self.path(job_id, "cancelled").exists():
            return "cancelled"
        try:
            return read_json(self.path(job_id, "ended"))["outcome"]
        except FileNotFoundError:
            return "" if self.path(job_id, "json").exists() else "unknown"
        except (Damaged, KeyError):  # it has ended; whoever waits for it must not wait for ever
            return "unknown"


@contextmanager
def standard_input(file: IO[str]) -> Iterator[None]:
    """Processes started meanwhile, and theirs, have `file` as standard input: the one descriptor
    that submitit's controller passes on."""
    saved = os.dup(0)
    try:
        os.dup2(file.fileno(), 0)
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)


def processes(lock: Path) -> dict[int, int]:
    """All processes of a job, with their parents: those that hold its lock as standard input."""
    held = lock.stat()
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.path.samestat(held, (entry / "fd/0").stat()):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = int(fields[1])
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def send(number: int, to: Iterable[int]) -> None:
    """Send a signal to processes; those that have ended meanwhile are left out."""
    for process in to:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def result_of(file: Path) -> str:
    """`success`, or else `error`, of one rank."""
    # submitit leaves the pickle of (success or error, value): the first string in it tells, and can
    # be read without running what a pickle may run
    try:
        values = (value for _, value, _ in pickletools.genops(file.read_bytes()))
        first = next(value for value in values if isinstance(value, str))
    except (OSError, ValueError, StopIteration):
        return "error"
    return "success" if first == "success" else "error"


def choose_gpus(wanted: int, jobs: int, taken: Iterable[str]) -> list[str]:
    """GPUs for a job: those that no other job has come first."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [str(i) for i in range(wanted * jobs)] if visible is None else visible.split(",")
    taken = set(taken)
    return sorted(every, key=lambda gpu: gpu in taken)[:wanted]
