"""Jobs as a cluster has them: processes that are killed, stopped and continued from outside, at any
moment. Each start of a job is a fork of one process that has torch imported, so it costs little."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from hpc.scheduler.job import ModuleCall
from tests.jobs import ranks

_PATIENCE = 60.0  # seconds
_POLL = 0.005


class Job:
    """One start of a task: its ranks, and what they print."""

    def __init__(self, call: ModuleCall, logs: Path, world_size: int) -> None:
        logs.mkdir(exist_ok=True, parents=True)
        start = f"start{len(list(logs.iterdir()))}"
        self._logs = [logs / f"{start}-{rank}.log" for rank in range(world_size)]
        self._ranks: list[BaseProcess] = [
            ranks._PROCESSES.Process(target=_rank, args=(call, log, start, rank, world_size))
            for rank, log in enumerate(self._logs)
        ]
        self.loaders: set[Path] = set()
        for log, rank in zip(self._logs, self._ranks, strict=True):
            log.touch()
            rank.start()

    @property
    def log(self) -> str:
        """Return the output of rank 0."""
        return self._logs[0].read_text()

    @property
    def logs(self) -> list[str]:
        return [log.read_text() for log in self._logs]

    @property
    def runs(self) -> bool:
        return any(rank.is_alive() for rank in self._ranks)

    def send(self, number: signal.Signals) -> None:
        """Signal all ranks, and not their loaders, which are noted before they are orphans."""
        self.loaders |= {loader for rank in self._ranks for loader in _children(rank.pid)}
        for rank in self._ranks:
            if rank.is_alive():
                os.kill(rank.pid, number)

    def stop(self) -> None:
        """Stop all ranks; returns when they stand still."""
        self.send(signal.SIGSTOP)
        until(lambda: all(_state(rank.pid) in "TZX" for rank in self._ranks), "ranks stood still")

    def kill(self) -> None:
        """Kill all ranks, as a node failure does. Return when they have exited."""
        self.send(signal.SIGKILL)
        self.end()

    def end(self, seconds: float = _PATIENCE) -> list[int | None]:
        """Exit codes of the ranks, once they have ended by themselves."""
        until(lambda: not self.runs, lambda: f"all ranks ended; {self.logs}", seconds)
        return [rank.exitcode for rank in self._ranks]


@contextmanager
def jobs(logs: Path) -> Iterator[Callable[..., Job]]:
    """A function that starts the job of a task file, or of a call that a plan made. Whatever it
    started is gone after the block."""
    started: list[Job] = []

    def start(task: Path | ModuleCall, world_size: int = 1) -> Job:
        call = task if isinstance(task, ModuleCall) else ModuleCall("jobs.train", (str(task),))
        started.append(Job(call, logs, world_size))
        return started[-1]

    try:
        yield start
    finally:
        for job in started:
            if job.runs:
                job.kill()


def _rank(call: ModuleCall, log: Path, start: str, rank: int, world_size: int) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ |= {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": start,
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_NTASKS": str(world_size),
        "SUBMITIT_LOCAL_LOCALID": str(rank),
    }
    # whatever state the libraries' generators are in, it has no part in the result
    torch.manual_seed(os.getpid())
    np.random.seed(os.getpid())
    call()


def until(
    condition: Callable[[], object], what: str | Callable[[], str], seconds: float = _PATIENCE
) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            raise AssertionError(
                f"not within {seconds} s: {what if isinstance(what, str) else what()}"
            )
        time.sleep(_POLL)


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`: which one it is, and the hash of a file's content. Who
    replaces a file by its like changes the first."""
    return {
        str(path.relative_to(folder)): (
            f"{path.stat().st_ino} "
            + (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder")
        )
        for path in folder.rglob("*")
    }


def _children(process: int | None) -> set[Path]:
    """Return the children of a process, as folders of /proc."""
    try:
        listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    except FileNotFoundError:
        return set()
    return {Path(f"/proc/{child}") for child in listed.split()}


def lives(process: Path) -> bool:
    """Return True if a process of /proc exists and is not a zombie."""
    return _state(process.name) not in "ZX"


def _state(process: int | str | None) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
