"""Read rank, world size and job from the launcher's environment, without heavy imports."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Launcher = Literal["torchrun", "submitit-local", "slurm", "mpi", "single"]

# rank, size, local rank and local size of Open MPI; MPICH, Intel MPI and Slurm's pmi2; MVAPICH2
_MPI_NAMES = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
)


@dataclass(frozen=True)
class RankEnv:
    """The place of this process in its job.

    `start_id` is equal on all ranks of one start of a job and differs from every other start. With
    it, ranks find each other, and not the ranks of an earlier start. Under torchrun it is unique
    only within the agent's store.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    node: str  # host name
    job_id: str  # Slurm's, as `scontrol requeue` takes it; "" outside Slurm
    start_id: str  # "" under `mpiexec` and without a launcher
    master: tuple[str, int] | None = None  # address and port of rank 0, if the launcher chose them
    agent_store: bool = False  # torchrun's agent serves that port; every rank is a client
    on_one_node: bool = False  # whether the launcher says that all ranks share a node


def read_env(environ: Mapping[str, str] = os.environ) -> RankEnv:
    """Return the place of this process in its job.

    torchrun's variables come first, since they are the most explicit. Slurm's variables count only
    inside an `srun` step, since a batch shell has them too. `mpiexec` inside an allocation starts
    its ranks in a step of its own, which has one task per node.
    """
    if _has_torchrun(environ):
        return _torchrun_rank(environ)
    if environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_JOB_ID" in environ:
        return _local_rank(environ)
    if names := _mpi_variables(environ):
        return _mpi_rank(environ, *names)
    if "SLURM_STEP_ID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        return _srun_rank(environ)
    return RankEnv("single", 0, 1, 0, socket.gethostname(), _slurm_job(environ), "")


def _torchrun_rank(environ: Mapping[str, str]) -> RankEnv:
    return RankEnv(
        "torchrun",
        *_place(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK"),
        job_id=_slurm_job(environ),
        start_id=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        master=(environ["MASTER_ADDR"], int(environ["MASTER_PORT"])),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        on_one_node=environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"],
    )


def _local_rank(environ: Mapping[str, str]) -> RankEnv:
    names = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID")
    job = environ.get("LOSSGRID_JOB_ID", socket.gethostname())
    return RankEnv(
        "submitit-local",
        *_place(environ, *names),
        job_id="",
        start_id=f"{job}-{environ['SUBMITIT_LOCAL_JOB_ID']}",
        on_one_node=True,
    )


def _mpi_variables(environ: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """Return the names of rank, size, local rank and local size that an `mpiexec` has set."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS") if "SLURM_STEP_ID" in environ else None
    for names in _MPI_NAMES:
        # under `srun --mpi=pmi2` these agree with Slurm's variables, which say more
        if names[0] in environ and environ.get(names[1], tasks) != tasks:
            return names
    return None


def _mpi_rank(
    environ: Mapping[str, str], rank: str, size: str, local: str, local_size: str
) -> RankEnv:
    return RankEnv(
        "mpi",
        *_place(environ, rank, size, local),
        job_id=_slurm_job(environ),
        start_id="",
        on_one_node=environ.get(local_size) == environ[size],
    )


def _srun_rank(environ: Mapping[str, str]) -> RankEnv:
    parts = [environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")]
    return RankEnv(
        "slurm",
        *_place(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        job_id=_slurm_job(environ),
        start_id="-".join([*parts, environ["SLURM_STEP_ID"]]),
        on_one_node=environ.get("SLURM_STEP_NUM_NODES") == "1",
    )


def single_process() -> RankEnv:
    """Return the place of a command on a login node: one rank, whatever the environment says."""
    return RankEnv("single", 0, 1, 0, socket.gethostname(), "", "")


def _has_torchrun(environ: Mapping[str, str]) -> bool:
    # Ignore variables left over from another launcher: some are missing, or their world is smaller
    # than the Slurm step of this process.
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        return False
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1") if "SLURM_STEP_ID" in environ else "1"
    return int(environ["WORLD_SIZE"]) >= int(tasks)


def _place(
    environ: Mapping[str, str], rank: str, size: str, local: str
) -> tuple[int, int, int, str]:
    local_rank = int(environ.get(local, environ[rank]))
    return int(environ[rank]), int(environ[size]), local_rank, socket.gethostname()


def _slurm_job(environ: Mapping[str, str]) -> str:
    # `scontrol requeue` takes an array element as ARRAY_TASK
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def announced_mpi_size(environ: Mapping[str, str]) -> int | None:
    """Return the number of ranks that an MPI launcher announced; None without an MPI launcher."""
    for _, size, *_ in _MPI_NAMES:
        if environ.get(size, "").isdigit():
            return int(environ[size])
    return srun_tasks(environ) if _srun_starts_mpi(environ) else None


def srun_tasks(environ: Mapping[str, str]) -> int | None:
    """Return the number of tasks of this `srun` step; None outside one."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(tasks) if tasks.isdigit() else None


def speaks_only_pmix(environ: Mapping[str, str]) -> bool:
    """Return whether the launcher speaks PMIx alone, as Open MPI's and `srun --mpi=pmix` do."""
    return "PMIX_RANK" in environ and "PMI_RANK" not in environ


def _srun_starts_mpi(environ: Mapping[str, str]) -> bool:
    # srun tells every task its plugin, "none" among them; PMIx and PMI name the rank as well
    plugin = environ.get("SLURM_MPI_TYPE", "none")
    return plugin != "none" or "PMIX_RANK" in environ or "PMI_RANK" in environ


def cpus_of_rank(env: RankEnv, environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of CPUs that this rank may use: a share of those that it can run on."""
    if environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return int(environ["SLURM_CPUS_PER_TASK"])
    local_size = environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's
    ranks = int(local_size) if local_size.isdigit() else env.world_size
    return max(1, len(os.sched_getaffinity(0)) // ranks)
