"""The files of the local queue, and the processes of its jobs.

`ID.json` is a local job: it says what to run. `ID.started` and `ID.ended` are written once each, so
a job starts at most once, whichever process dies in between. All processes of a job inherit the
open and locked `ID.lock` as standard input. The kernel releases the lock when the last of them
ends. The lock thus tells if a job lives, even if its runner was killed, process ids were reused, or
another host asks.
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

_PREFIX = "local-"  # of job ids


def is_local(job_id: str) -> bool:
    """Return whether a job id is one of a local queue."""
    return job_id.startswith(_PREFIX)


class LocalJobs:
    """The job files of one queue. Callers that change them hold `locked`.

    Only the user, or `group`, may write to them, since a local job is a command.
    """

    def __init__(self, folder: Path, group: str = "") -> None:
        self.folder = folder
        self.group = group

    def path(self, job_id: str, kind: str) -> Path:
        """Return a file of a job; `kind`: json, started, ended, cancelled, refused or lock."""
        return self.folder / f"{job_id}.{kind}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from adding, starting, cancelling or ending jobs in the block."""
        private_folder(self.folder, self.group)
        with self._lock_file("tickets.lock") as file:
            take_lock(file, wait=True)
            yield

    @contextmanager
    def runner_lock(self) -> Iterator[IO[str] | None]:
        """Yield the runner's lock, or None if another process holds it."""
        with self._lock_file("lock") as file:
            yield file if take_lock(file) else None

    def has_runner(self) -> bool:
        """Return whether a process starts the waiting jobs; True if the files cannot be read.

        Changes nothing.
        """
        try:
            with (
                (self.folder / "tickets.lock").open() as guard,
                (self.folder / "lock").open() as lock,
            ):
                take_lock(guard, fcntl.LOCK_SH, wait=True)  # so that no runner starts meanwhile
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
                f"cannot write {path}: {error.strerror}; free space or fix permissions, run again"
            ) from error

    def add(self, jobs: Sequence[dict[str, Any]], token: str = "") -> list[str]:
        """Queue jobs under a submission token. Return their ids."""
        numbers = [int(file.stem.removeprefix(_PREFIX)) for file in self.folder.glob("*.json")]
        first = max(numbers, default=0) + 1
        ids = [f"{_PREFIX}{number:06d}" for number in range(first, first + len(jobs))]
        for element, (job_id, job) in enumerate(zip(ids, jobs, strict=True)):
            write_json(self.path(job_id, "json"), {**job, "token": token, "element": element})
        return ids

    def find_by_token(self, tokens: Iterable[str]) -> dict[str, dict[int, str]]:
        """Return the jobs added under some tokens: token -> index in its submission -> id."""
        found: dict[str, dict[int, str]] = {token: {} for token in tokens}
        for path in self.folder.glob("*.json"):
            with suppress(Damaged, FileNotFoundError):
                job = read_json(path)
                if job.get("token") in found:
                    found[job["token"]][job["element"]] = path.stem
        return found

    def read(self, job_id: str) -> dict[str, Any]:
        """Return what a job runs, as `add` got it."""
        return read_json(self.path(job_id, "json"))

    def gpus(self, job_id: str) -> list[str]:
        """Return the GPUs that a started job was given."""
        return read_json(self.path(job_id, "started"))["gpus"]

    def end(self, job_id: str, outcome: Outcome) -> None:
        """Record that a job has ended."""
        write_json(self.path(job_id, "ended"), {"outcome": outcome, "time": time.time()})

    def open_ids(self) -> list[str]:
        """Return the jobs without an end record, in order."""
        names = {file.name for file in self.folder.iterdir()}
        ids = {name.removesuffix(".json") for name in names if name.endswith(".json")}
        return sorted(job_id for job_id in ids if f"{job_id}.ended" not in names)

    def state(self, job_id: str) -> State:
        """Return the state of a job. A started one without a living process is gone."""
        if self.path(job_id, "ended").exists() or not self.path(job_id, "json").exists():
            return "gone"
        if not self.path(job_id, "started").exists():
            return "waiting"
        with self.path(job_id, "lock").open() as file:
            return "gone" if take_lock(file, fcntl.LOCK_SH) else "running"

    def job_state(self, job_id: str) -> JobState:
        """Return the state of a job, with the outcome if it has ended."""
        state = self.state(job_id)
        if state != "gone":
            return JobState(state)
        outcome = self.outcome(job_id)
        return JobState(state, "" if outcome == "unknown" else outcome)

    def outcome(self, job_id: str) -> str:
        """Return the `Outcome` of a job; a cancelled one is cancelled even if it ended well.

        "unknown" if there is no such job or its record is damaged; "" if it is not recorded yet.
        """
        if self.path(job_id, "cancelled").exists():
            return "cancelled"
        try:
            return read_json(self.path(job_id, "ended"))["outcome"]
        except FileNotFoundError:
            return "" if self.path(job_id, "json").exists() else "unknown"
        except (Damaged, KeyError):  # it has ended, and jobs behind it must not wait forever
            return "unknown"


@contextmanager
def standard_input(file: IO[str]) -> Iterator[None]:
    """Give `file` as standard input to processes started in the block, and to their children.

    It is the one descriptor that submitit's controller passes on.
    """
    saved = os.dup(0)
    try:
        os.dup2(file.fileno(), 0)
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)


def processes(lock: Path) -> dict[int, int]:
    """Return the processes of a job, pid -> parent: those with its lock as standard input."""
    of_job = lock.stat()
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.path.samestat(of_job, (entry / "fd/0").stat()):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = int(fields[1])
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return found


def send(number: int, to: Iterable[int]) -> None:
    """Send signal `number` to processes; ignore those that have ended."""
    for process in to:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def result_of(file: Path) -> str:
    """Return `success` or `error` from the result file of one rank."""
    # submitit pickles (success or error, value). The first string of the pickle tells, and reading
    # it runs no code from the pickle.
    try:
        values = (value for _, value, _ in pickletools.genops(file.read_bytes()))
        first = next(value for value in values if isinstance(value, str))
    except (OSError, ValueError, StopIteration):
        return "error"
    return "success" if first == "success" else "error"


def choose_gpus(wanted: int, visible: Sequence[str], taken: Iterable[str]) -> list[str]:
    """Return `wanted` of the `visible` GPUs, first those that no other job has.

    Raises:
        UserError: So many are not visible.
    """
    if wanted > len(visible):
        raise UserError(
            f"the job needs {wanted} GPUs, and CUDA_VISIBLE_DEVICES shows {len(visible)}; set "
            "gpus_per_node in the cluster profile"
        )
    taken = set(taken)
    return sorted(visible, key=lambda gpu: gpu in taken)[:wanted]
