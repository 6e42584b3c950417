"""The one interface to whatever starts jobs: Slurm where there is one, or a queue of our own."""

from __future__ import annotations

import shutil
from pathlib import Path

from hpc.cli import UserError, one_line
from hpc.scheduler.base import Queue
from hpc.scheduler.cluster_profile import ClusterProfile
from hpc.scheduler.local import LocalQueue
from hpc.scheduler.slurm import SlurmQueue


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
