"""What the launcher says about this process: the one reader of the environment. Stdlib only."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc.account import expanded

Launcher = Literal["torchrun", "submitit-local", "slurm", "mpi", "single"]

# Of Open MPI; of MPICH and Intel MPI.
_MPI_NAMES = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class RankEnv:
    """This process's place in its job.

    `start_id` is equal on all ranks of one start of a job and differs from every other start, so
    that ranks find each other and not those of a start before; it is "" where the launcher gives
    none (`mpiexec`) or where there is only one rank. `job_id` is Slurm's, as `scontrol requeue`
    takes it; "" outside of Slurm. `on_one_node` is False where the launcher does not say so.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    node: str
    job_id: str
    start_id: str
    master: tuple[str, int] | None = None  # address and port of rank 0, where the launcher chose
    agent_store: bool = False  # torchrun's agent serves that port itself; every rank is a client
    on_one_node: bool = False  # all ranks of the job


def read_env(environ: Mapping[str, str] = os.environ) -> RankEnv:
    """Who am I? torchrun's variables come first, since they are the most explicit; Slurm's count
    only inside an `srun` step: a batch shell has them too, but is one process. `mpiexec` in an
    allocation brings its ranks up in a step of its own, which has one task a node."""
    node = socket.gethostname()
    if _has_torchrun(environ):
        master = (environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))
        agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return RankEnv("torchrun", *_place(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK"),
                       node=node, job_id=_slurm_job(environ), master=master, agent_store=agent,
                       on_one_node=environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"],
                       start_id=environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # fmt: skip
    if environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_JOB_ID" in environ:
        job = environ["SUBMITIT_LOCAL_JOB_ID"]
        names = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID")
        return RankEnv("submitit-local", *_place(environ, *names), node=node, job_id="",
                       on_one_node=True,
                       start_id=f"{environ.get('LOSSGRID_JOB_ID', node)}-{job}")  # fmt: skip
    tasks = environ.get("SLURM_STEP_NUM_TASKS") if "SLURM_STEP_ID" in environ else None
    for rank, size, local, local_size in _MPI_NAMES:
        # under `srun --mpi=pmi2` they and Slurm's agree, and Slurm's say more
        if rank in environ and environ.get(size, tasks) != tasks:
            return RankEnv("mpi", *_place(environ, rank, size, local), node=node,
                           job_id=_slurm_job(environ), start_id="",
                           on_one_node=environ.get(local_size) == environ[size])  # fmt: skip
    if tasks is not None:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        parts = [environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")]
        start = "-".join([*parts, environ["SLURM_STEP_ID"]])
        return RankEnv("slurm", *_place(environ, *names), node=node, job_id=_slurm_job(environ),
                       start_id=start,
                       on_one_node=environ.get("SLURM_STEP_NUM_NODES") == "1")  # fmt: skip
    return RankEnv("single", 0, 1, 0, node, _slurm_job(environ), "")


def alone() -> RankEnv:
    """Return the place of a process that is no rank of a job, whatever a launcher has left in its
    environment: of commands that users start on a login node."""
    return RankEnv("single", 0, 1, 0, socket.gethostname(), "", "")


def _has_torchrun(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, or a launcher that sets its variables, started this process. Some of them,
    or a world smaller than the step of Slurm that we are in, are left over from another one."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        return False
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1") if "SLURM_STEP_ID" in environ else "1"
    return int(environ["WORLD_SIZE"]) >= int(tasks)


def _place(environ: Mapping[str, str], rank: str, size: str, local: str) -> tuple[int, int, int]:
    return int(environ[rank]), int(environ[size]), int(environ.get(local, environ[rank]))


def _slurm_job(environ: Mapping[str, str]) -> str:
    """The id that `scontrol requeue` takes: of an array's element it is `ARRAY_TASK`."""
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "")


def torch_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Where torch keeps downloaded weights, by torch's own rule."""
    cache = environ.get("XDG_CACHE_HOME") or expanded("~/.cache")
    return expanded(environ.get("TORCH_HOME") or Path(cache) / "torch")


def default_config(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The grid file that `$LOSSGRID_CONFIG` names, if it is set."""
    name = environ.get("LOSSGRID_CONFIG")
    return expanded(name) if name else None
