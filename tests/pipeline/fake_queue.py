"""A queue in which nothing runs: jobs are in the state that a test says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hpc.call import ModuleCall
from hpc.profile import Resources


class FakeQueue:
    """Jobs wait until the test says otherwise."""

    def __init__(self, folder: Path, gone_is_certain: bool = True) -> None:
        self.gone_is_certain = gone_is_certain
        self.jobs: dict[str, str] = {}
        self.calls: dict[str, ModuleCall] = {}
        self.after: dict[str, list[str]] = {}
        self.questions = 0
        self._folder = folder

    def submit(
        self,
        calls: Sequence[ModuleCall],
        resources: Resources,
        name: str,
        after: Sequence[str] = (),
    ) -> list[str]:
        ids = [f"job{len(self.jobs) + number}" for number in range(1, len(calls) + 1)]
        for job, call in zip(ids, calls, strict=True):
            self.jobs[job], self.calls[job], self.after[job] = "waiting", call, list(after)
        return ids

    def states(self, ids: Iterable[str]) -> dict[str, str]:
        self.questions += 1
        return {job: self.jobs.get(job, "gone") for job in ids}

    def cancel(self, ids: Iterable[str]) -> None:
        raise NotImplementedError

    def log_files(self, job_id: str) -> list[Path]:
        path = self._folder / f"{job_id}.err"
        return [path] if path.exists() else []

    def ensure_runner(self) -> None:
        raise NotImplementedError
