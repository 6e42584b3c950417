"""Define the interface of a job queue, which Slurm and the local queue implement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from hpc.cli import UserError
from hpc.scheduler.cluster_profile import Resources
from hpc.scheduler.job import ModuleCall

State = Literal["waiting", "running", "gone", "unknown"]
Outcome = Literal["succeeded", "failed", "cancelled", "dependency failed"]
DEPENDENCY_FAILED: Outcome = "dependency failed"
NO_RUNNER = "no process starts it"  # why a job waits in a local queue without a runner
DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's own default


class JobState(NamedTuple):
    """The state of a job, as its queue reports it.

    Attributes:
        state: `waiting`, `running`, `gone` (ended, or not known to the queue), or `unknown` if the
            queue cannot be asked.
        why: The queue's word, if it has one: what a waiting job waits for (`Resources`), or how a
            job has ended (`NODE_FAIL`).
    """

    state: State
    why: str = ""


class QueueUnreachable(UserError):
    """The queue did not answer. Its jobs are in an unknown state; ask again later."""


class Queue(Protocol):
    """A job queue. Callers submit calls and get job ids, and need to remember only these.

    Attributes:
        has_site: Jobs go to the partitions of a cluster, under its accounts and limits.
        starts_mpi: The tasks of a job are the ranks of one MPI world.
        unreachable: Why a queue that was opened `read_only` cannot be asked; else "".
        poll_seconds: Pause in seconds between two questions of a caller that waits.
    """

    has_site: bool
    starts_mpi: bool
    unreachable: str
    poll_seconds: float

    def gone_is_certain(self, job_id: str) -> bool:
        """Return True if a job that is `gone` surely has no process left.

        False for a job of another queue: the user may have changed the cluster profile.
        """

    def check(self) -> None:
        """Ask whether the queue answers.

        Raises:
            QueueUnreachable: It does not. A queue opened `read_only` sets `unreachable` instead.
        """

    def trial(self, resources: Resources, name: str, num_calls: int = 1) -> str:
        """Ask whether the queue would take `num_calls` jobs with these resources; queue nothing.

        Returns:
            The queue's answer.

        Raises:
            UserError: The queue would refuse the jobs, or does not answer.
        """

    def submit(
        self,
        calls: Sequence[ModuleCall],
        resources: Resources,
        name: str,
        after: Sequence[str] = (),
        token: str = "",
        needs: Sequence[str] = (),
    ) -> list[str]:
        """Queue one job per call, all with the same resources.

        Args:
            calls: One call per job.
            resources: What each job gets.
            name: Name of the jobs in the queue.
            after: Jobs that must have ended before these start, with or without success.
            token: Submission token, a new word without `+`. `find_by_token` finds the jobs by it
                if the caller dies before it has recorded their ids.
            needs: Jobs that must have succeeded. If one of them fails, the jobs end without a
                start.

        Returns:
            The job ids, in the order of `calls`.

        Raises:
            UserError: The queue refuses the jobs, or a job in `needs` has failed already.
        """

    def find_by_token(self, tokens: Iterable[str]) -> dict[str, dict[int, str]]:
        """Return the jobs queued under some submission tokens: token -> index of the call -> id.

        A queue opened `read_only` that does not answer finds none.

        Raises:
            QueueUnreachable: The queue does not answer.
        """

    def job_states(self, ids: Iterable[str]) -> dict[str, JobState]:
        """Return the state of each job.

        If a queue opened `read_only` does not answer, all jobs are `unknown`.

        Raises:
            QueueUnreachable: The queue does not answer, so no job can be called `gone`.
        """

    def final_states(self, ids: Iterable[str]) -> dict[str, str]:
        """Return the final state of jobs from accounting, if `job_states` does not report it."""

    def free_slots(self) -> int | None:
        """Return how many more jobs the queue takes from this user now; None if there is no limit
        or it is not known."""

    def cancel(self, ids: Iterable[str]) -> None:
        """End jobs; ignore those that are gone.

        Waiting jobs never start. Running jobs get SIGTERM, time to save, and then SIGKILL.
        """

    def log_files(self, job_id: str) -> list[Path]:
        """Return the stderr logs that a job has written so far, one per rank, in order of rank."""

    def max_array_size(self) -> int:
        """Return the maximum number of jobs in one array; Slurm's default if it is not known."""

    def ensure_runner(self) -> None:
        """Make sure that a process starts the waiting jobs; callers that wait call it again."""

    def wait_for_runner(self, seconds: float) -> None:
        """Wait up to `seconds` until no process of the queue works in its folder.

        For callers that remove the folder next. All jobs must have ended.
        """


def needed_job_failed(job_id: str, word: str) -> UserError:
    """Return the error for jobs that need `job_id`, which ended as `word`."""
    return UserError(
        f"job {job_id}, which these jobs need, did not succeed ({word}); read its log, fix the "
        "cause, and submit again"
    )
