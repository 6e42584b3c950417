"""A queue in which nothing runs: jobs are in the state that a test says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hpc.scheduler.base import DEFAULT_MAX_ARRAY_SIZE, JobState
from hpc.scheduler.cluster_profile import Resources
from hpc.scheduler.job import ModuleCall


class FakeQueue:
    """Jobs wait until the test says otherwise."""

    starts_mpi = False
    unreachable = ""
    poll_seconds = 0.01

    def check(self) -> None:
        """It answers."""

    def __init__(self, folder: Path, gone_is_certain: bool = True) -> None:
        self._is_certain = gone_is_certain
        self.jobs: dict[str, str] = {}
        self.calls: dict[str, ModuleCall] = {}
        self.after: dict[str, list[str]] = {}
        self.needs: dict[str, list[str]] = {}
        self.tokens: dict[str, dict[int, str]] = {}
        self.asked_for: list[list[str]] = []  # the tokens of each question
        self.questions = 0
        self.runner_calls = 0
        self.why: dict[str, str] = {}
        self.max_jobs: int | None = None
        self.cancelled: list[list[str]] = []  # the jobs of each call
        self.accounting: dict[str, str] = {}
        self.recalled: list[list[str]] = []  # the jobs that it was asked about
        self._folder = folder

    def gone_is_certain(self, job_id: str) -> bool:
        """Answer for jobs of this queue; those of scripts went to another one."""
        return self._is_certain and "_" not in job_id

    def submit(
        self,
        calls: Sequence[ModuleCall],
        resources: Resources,
        name: str,
        after: Sequence[str] = (),
        token: str = "",
        needs: Sequence[str] = (),
    ) -> list[str]:
        ids = [f"job{len(self.jobs) + number}" for number in range(1, len(calls) + 1)]
        for job, call in zip(ids, calls, strict=True):
            self.jobs[job], self.calls[job] = "waiting", call
            self.after[job], self.needs[job] = list(after), list(needs)
        self.tokens[token] = dict(enumerate(ids))
        return ids

    def find_by_token(self, tokens: Iterable[str]) -> dict[str, dict[int, str]]:
        self.asked_for.append(sorted(tokens))
        return {token: self.tokens.get(token, {}) for token in tokens}

    def job_states(self, ids: Iterable[str]) -> dict[str, JobState]:
        self.questions += 1
        return {job: JobState(self.jobs.get(job, "gone"), self.why.get(job, "")) for job in ids}

    def free_slots(self) -> int | None:
        queued = sum(state != "gone" for state in self.jobs.values())
        return None if self.max_jobs is None else max(0, self.max_jobs - queued)

    def cancel(self, ids: Iterable[str]) -> None:
        """Every one of them ends at once."""
        self.cancelled.append(sorted(ids))
        for job in self.cancelled[-1]:
            self.jobs[job], self.why[job] = "gone", "CANCELLED"

    def final_states(self, ids: Iterable[str]) -> dict[str, str]:
        self.recalled.append(sorted(ids))
        return {job: self.accounting[job] for job in ids if job in self.accounting}

    def log(self, job_id: str) -> Path:
        """Return the log of the one rank of a job."""
        return self._folder / f"{job_id}.err"

    def log_files(self, job_id: str) -> list[Path]:
        return [path] if (path := self.log(job_id)).exists() else []

    def max_array_size(self) -> int:
        return DEFAULT_MAX_ARRAY_SIZE

    def ensure_runner(self) -> None:
        self.runner_calls += 1

    def wait_for_runner(self, seconds: float) -> None:
        """It has none."""
