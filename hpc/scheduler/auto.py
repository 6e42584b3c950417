"""Choose the queue: Slurm where it is installed, else the local queue."""

from __future__ import annotations

import shutil
from pathlib import Path

from hpc.cli import UserError, one_line
from hpc.distributed.launcher import RankEnv
from hpc.scheduler import slurm_cli
from hpc.scheduler.base import Queue
from hpc.scheduler.cluster_profile import ClusterProfile
from hpc.scheduler.local import LocalQueue
from hpc.scheduler.slurm import SlurmQueue


def open_queue(
    profile: ClusterProfile, folder: str | Path, queue_folder: str | Path, read_only: bool = False
) -> Queue:
    """Return the queue that a profile names. Opening starts no process.

    Args:
        profile: `kind = "auto"` means Slurm if there is an `sbatch` on PATH.
        folder: Takes submission files and logs; visible on all nodes of a cluster.
        queue_folder: Takes the job files of the local queue.
        read_only: For callers that neither submit nor cancel: if Slurm does not answer, its jobs
            are `unknown` and no error is raised.

    Raises:
        UserError: The path of `folder` cannot be part of a log's name.
        QueueUnreachable: Slurm is not installed here, or does not answer.
    """
    _refuse_odd_folder(Path(folder).absolute())
    if _means_slurm(profile):
        return SlurmQueue(profile, folder, read_only)
    return LocalQueue(profile, folder, queue_folder)


def jobs_at_once(profile: ClusterProfile) -> int:
    """Return how many jobs of one submission the profile lets run at the same time."""
    return profile.array_parallelism if _means_slurm(profile) else profile.local_jobs


def has_time_limit(profile: ClusterProfile) -> bool:
    """Return True if the queue of a profile ends jobs at the profile's time limit."""
    return _means_slurm(profile)


def requeue(env: RankEnv) -> bool:
    """Put this job back into its queue. Only rank 0 calls it, after a signal to stop.

    Returns:
        True if the queue will start the job again. False if nothing was done: the job has no such
        queue, or the queue is ending it already.

    Raises:
        UserError: The queue does not answer, or refuses.
    """
    return bool(env.job_id) and slurm_cli.requeue(env.job_id)


def _means_slurm(profile: ClusterProfile) -> bool:
    return profile.kind == "slurm" or (profile.kind == "auto" and bool(shutil.which("sbatch")))


def _refuse_odd_folder(folder: Path) -> None:
    # submitit and Slurm replace %x in the name of a log, and a backslash switches that off
    odd = [c for c in str(folder) if c in "%\\" or not c.isprintable()]
    if odd:
        raise UserError(
            f"the folder {one_line(str(folder))} has {odd[0]!r} in its path, which cannot be"
            " in the name of a log; choose another one"
        )
