"""Remove variables of the submitting shell that would change a job or a Slurm command.

The cluster profile decides where and how a job runs, and the job's own launcher numbers its ranks.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

# A process's rank, by torchrun, submitit, Open MPI, MPICH and Intel MPI, MVAPICH, PMIx.
LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_*", "SUBMITIT_*", "OMPI_COMM_WORLD_*", "PMI_RANK", "PMI_SIZE", "PMI_FD",
    "PMI_PORT", "PMI_ID", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_*", "PMIX_RANK",
    "PMIX_NAMESPACE", "PMIX_SERVER_*",
)  # fmt: skip
# Options of Slurm commands ("INPUT ENVIRONMENT VARIABLES" of their manual pages). They win over the
# `#SBATCH` lines of a script.
OPTIONS = ("SBATCH_*", "SALLOC_*", "SRUN_*", "SQUEUE_*", "SCANCEL_*", "SCONTROL_*", "SACCT_*",
           "SINFO_*")  # fmt: skip
# Options of srun, and variables that Slurm sets in a job.
_JOB = ("SLURM_*", "SLURMD_*")
# The place of Slurm's configuration, and the user's token.
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
# Slurm sets one of these in a job, and srun refuses two. Without any, a step has the job's memory.
_MEMORY = ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_MEM_PER_NODE")
_WIDTH = 92
_NOT_USED = "is not used; jobs get what the cluster profile says"


def slurm_environ(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return `environ` without options of Slurm, a surrounding job and a launcher's variables.

    Every Slurm command is called with it, and sbatch passes it to the job.
    """
    dropped = {*_matching(environ, (*OPTIONS, *_JOB, *LAUNCHER))} - {*KEPT}
    return {name: value for name, value in environ.items() if name not in dropped}


def ignored_options(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return a warning about dropped options of sbatch that the user may have set on purpose."""
    names = sorted(_matching(environ, ("SBATCH_*", "SLURM_CLUSTERS")))
    line = f"{', '.join(names)} of this shell {_NOT_USED}"
    return [line] if names else []


@contextmanager
def called_clean() -> Iterator[None]:
    """Give this process `slurm_environ` as environment inside the block.

    submitit starts sbatch and local jobs in the environment of the calling process.
    """
    before = dict(os.environ)
    for name in before.keys() - slurm_environ(before).keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return the GPUs that CUDA_VISIBLE_DEVICES lists; None if it is not set."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    return None if listed is None else listed.split(",")


def submitting_lines() -> list[str]:
    """Return lines of a bash script that calls sbatch: they unset what `slurm_environ` drops."""
    return [
        f"for name in {_words((*OPTIONS, *_JOB, *LAUNCHER))}; do",
        f'    [[ $name != SBATCH_* ]] || echo "warning: $name of this shell {_NOT_USED}" >&2',
        f'    case $name in {"|".join(KEPT)}) ;; *) unset "$name" ;; esac',
        "done",
    ]


def batch_lines() -> list[str]:
    """Return lines of a batch script that unset the submitting shell's variables for srun.

    They keep what Slurm has set for this job.
    """
    return [
        "# left over by the shell that ran sbatch; srun gives the ranks their own",
        f"unset {_words(('SRUN_*', *_MEMORY, *LAUNCHER))}",
    ]


def _matching(environ: Mapping[str, str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in environ if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _words(patterns: tuple[str, ...]) -> str:
    """Return the names as bash words; `${!PMIX_@}` expands to all names that begin with PMIX_."""
    words = [f"${{!{p[:-1]}@}}" if p.endswith("*") else p for p in patterns]
    return " \\\n    ".join(textwrap.wrap(" ".join(words), _WIDTH, break_long_words=False))
