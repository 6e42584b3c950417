"""The one interface to whatever starts jobs: Slurm where there is one, or a queue of our own."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from hpc.cli import UserError, one_line
from hpc.scheduler.cluster_profile import ClusterProfile, Resources
from hpc.scheduler.job import ModuleCall
from hpc.scheduler.local import LocalQueue
from hpc.scheduler.local_jobs import JobState, State
from hpc.scheduler.slurm import SlurmQueue


class Queue(Protocol):
    """Jobs go in as calls and come back as ids; ids are all that one has to remember."""

    gone_is_certain: bool  # whether a job that is gone can have no process left
    starts_mpi: bool  # whether the tasks of a job are ranks of one MPI world
    unreachable: str  # why a queue that was opened `read_only` cannot be asked; else ""
    poll_seconds: float  # how long callers that wait in a loop leave it alone between two questions

    def check(self) -> None:
        """Ask whether the queue answers. Raises `QueueUnreachable`, or sets `unreachable` if the
        queue was opened `read_only`."""

    def submit(
        self,
        calls: Sequence[ModuleCall],
        resources: Resources,
        name: str,
        after: Sequence[str] = (),
        token: str = "",
        needs: Sequence[str] = (),
    ) -> list[str]:
        """Queue one job a call, all with the same resources; their ids, in the order of `calls`.
        A `token`, a new word, is what `sent_as` finds them by if the caller dies before it has
        their ids.

        The jobs start when every job in `after` has ended, however it ended, and every job in
        `needs` has succeeded. If a job in `needs` fails, they end without a start. Raises
        `UserError` if the queue refuses them, or if a job in `needs` has failed already.
        """

    def sent_as(self, tokens: Iterable[str]) -> dict[str, dict[int, str]]:
        """The jobs that were queued with some `tokens`: by token, and number of the call among
        those it was given with. Raises `QueueUnreachable` as `look` does; finds nothing if the
        queue was opened `read_only`."""

    def look(self, ids: Iterable[str]) -> dict[str, JobState]:
        """The state of each job: `waiting`, `running`, or `gone`: ended or unknown; and why. Raises
        `QueueUnreachable` rather than calling a job gone because the queue did not answer. If the
        queue was opened `read_only`, all jobs are then `unknown`.
        """

    def states(self, ids: Iterable[str]) -> dict[str, State]:
        """The same without why."""

    def remembered(self, ids: Iterable[str]) -> dict[str, str]:
        """The last words of jobs that `look` has none for, as far as an accounting knows them."""

    def room(self) -> int | None:
        """How many more jobs the queue takes of this user now; None where nothing limits them."""

    def cancel(self, ids: Iterable[str]) -> None:
        """End jobs: the waiting ones never start, the running ones get SIGTERM, time to save,
        and then SIGKILL. Jobs that are gone are left alone.
        """

    def log_files(self, job_id: str) -> list[Path]:
        """The stderr logs that a job has written so far, one a rank, in order of rank."""

    def max_array_size(self) -> int:
        """Return how many elements an array of jobs may have, or Slurm's own default where that
        cannot be asked."""

    def ensure_runner(self) -> None:
        """Make sure that something starts the waiting jobs. For callers that wait in a loop."""

    def let_runner_leave(self, seconds: float) -> None:
        """Wait up to `seconds` until nothing of the queue works in its folder, which the caller
        removes next. All jobs have ended."""


def open_queue(
    profile: ClusterProfile, folder: str | Path, queue_folder: str | Path, read_only: bool = False
) -> Queue:
    """Return the queue a profile means. `folder` takes submission files and logs, `queue_folder`
    the tickets of the local queue; on a cluster both must be visible on all nodes.

    `kind = "auto"` is Slurm if there is an `sbatch` on PATH. Opening starts nothing. With
    `read_only`, for callers that neither submit nor cancel, a Slurm that does not answer is no
    error: its jobs are `unknown`.

    Raises:
        QueueUnreachable: Slurm is not here or does not answer.
    """
    _refuse_odd_folder(Path(folder).absolute())
    if profile.kind == "slurm" or (profile.kind == "auto" and shutil.which("sbatch")):
        return SlurmQueue(profile, folder, read_only)
    return LocalQueue(profile, folder, queue_folder)


def _refuse_odd_folder(folder: Path) -> None:
    # submitit and Slurm replace %x in the name of a log, a backslash switches that off
    odd = [c for c in str(folder) if c in "%\\" or not c.isprintable()]
    if odd:
        raise UserError(
            f"the folder {one_line(str(folder))} has {odd[0]!r} in its path, which cannot be"
            " in the name of a log; choose another one"
        )
