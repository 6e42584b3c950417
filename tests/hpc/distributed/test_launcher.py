"""Rank and world size are read from the variables that each launcher really sets."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.distributed.launcher import (
    RankEnv,
    cpus_of_rank,
    read_env,
    single_process,
)

REPOSITORY = Path(__file__).parents[3]

# Slurm 22.05, an array's element on 2 nodes with 2 tasks each: the batch shell on the first node,
# and the fourth task that `srun` starts in it.
BATCH = {
    "SLURM_JOB_ID": "2", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]",
    "SUBMITIT_EXECUTOR": "slurm",
}  # fmt: skip
STEP = {
    **BATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_SRUN_COMM_HOST": "10.77.0.11",
}  # fmt: skip
LOCAL = {
    "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "4711", "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_NODEID": "0",
    "LOSSGRID_JOB_ID": "local-000003", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "RANK": "5",
    "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "PMIX_RANK": "2",
}  # fmt: skip
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "PMI_FD": "7"}


def place(environ) -> tuple[str, int, int, int]:
    env = read_env(environ)
    return env.launcher, env.rank, env.world_size, env.local_rank


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("single", 0, 1, 0)),
        (STEP, ("slurm", 3, 4, 1)),
        (BATCH, ("single", 0, 1, 0)),  # it has a rank and a number of tasks, but is one process
        (LOCAL, ("submitit-local", 1, 2, 1)),
        (TORCHRUN, ("torchrun", 5, 8, 1)),
        (OPENMPI, ("mpi", 2, 3, 0)),
        (MPICH, ("mpi", 1, 2, 1)),
        (MVAPICH, ("mpi", 1, 2, 0)),
    ],
    ids=[
        "nothing",
        "srun",
        "batch shell",
        "local queue",
        "torchrun",
        "Open MPI",
        "MPICH",
        "MVAPICH",
    ],
)
def test_each_launcher_gives_rank_and_world_size(environ, expected):
    assert place(environ) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (LOCAL, True),
        (STEP, False),
        ({**STEP, "SLURM_STEP_NUM_NODES": "1"}, True),
        (TORCHRUN, False),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, False),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, True),
        (OPENMPI, False),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, False),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, True),
        ({**MPICH, "MPI_LOCALNRANKS": "2"}, True),
        ({**MVAPICH, "MV2_COMM_WORLD_LOCAL_SIZE": "1"}, False),
    ],
)
def test_launchers_say_whether_all_ranks_are_on_one_node(environ, expected):
    assert read_env(environ).on_one_node is expected


@pytest.mark.parametrize("torchelastic", [{}, {"TORCHELASTIC_RUN_ID": "none"}])
def test_a_world_smaller_than_the_step_is_left_over(torchelastic):
    left = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1", **torchelastic}
    assert place({**STEP, **left}) == ("slurm", 3, 4, 1)
    assert place(left) == ("torchrun", 0, 1, 0)  # no other launcher is there


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_some_of_torchruns_variables_are_left_over(missing):
    left = {name: value for name, value in TORCHRUN.items() if name != missing}
    assert place(left) == ("single", 0, 1, 0)
    assert place({**STEP, **left}) == ("slurm", 3, 4, 1)


def test_a_command_of_the_login_node_is_alone(monkeypatch):
    for name, value in {**TORCHRUN, **STEP}.items():
        monkeypatch.setenv(name, value)
    env = single_process()
    assert (env.launcher, env.rank, env.world_size, env.job_id) == ("single", 0, 1, "")


def test_a_smaller_step_counts_its_own_tasks():
    assert place({**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"})[:3] == ("slurm", 1, 2)


def test_torchrun_says_where_rank_0_is_and_whether_its_agent_serves_there():
    env = read_env(TORCHRUN)
    assert env.master == ("10.0.0.7", 29400) and env.agent_store
    by_hand = {k: v for k, v in TORCHRUN.items() if not k.startswith("TORCHELASTIC")}
    env = read_env(by_hand)
    assert (env.launcher, env.rank, env.agent_store) == ("torchrun", 5, False)
    assert read_env(STEP).master is None


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({**STEP, **TORCHRUN}, "torchrun"),  # srun starts torchrun, which starts the ranks
        ({**BATCH, **TORCHRUN}, "torchrun"),
        ({**STEP, **LOCAL}, "submitit-local"),  # the local queue was started in an allocation
        ({**STEP, "SUBMITIT_EXECUTOR": "local"}, "slurm"),  # without a job it is left over
        ({**BATCH, **OPENMPI}, "mpi"),
        ({**BATCH, **MPICH}, "mpi"),
    ],
)
def test_of_nested_launchers_the_inner_one_counts(environ, launcher):
    assert read_env(environ).launcher == launcher


@pytest.mark.parametrize("inner", [OPENMPI, MPICH])
def test_mpiexec_in_an_allocation_comes_up_through_a_step_with_one_task_a_node(inner):
    helpers = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert place({**helpers, **inner}) == place(inner)


def test_srun_that_speaks_pmi_is_still_srun():
    pmi = {"PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_MPI_TYPE": "pmi2"}
    env = read_env({**STEP, **pmi})
    assert (env.launcher, env.rank, env.world_size, env.local_rank) == ("slurm", 3, 4, 1)
    assert env.start_id  # which plain PMI does not have


def test_the_job_is_named_as_scontrol_requeue_takes_it():
    assert read_env(STEP).job_id == "1_0"  # its raw id could be the whole array's
    no_array = {k: v for k, v in STEP.items() if not k.startswith("SLURM_ARRAY")}
    assert read_env(no_array).job_id == "2"
    assert read_env({**BATCH, **TORCHRUN}).job_id == read_env(BATCH).job_id == "1_0"
    assert read_env({**BATCH, **MPICH}).job_id == "1_0"


@pytest.mark.parametrize("environ", [{}, LOCAL, {**STEP, **LOCAL}, TORCHRUN, MPICH])
def test_outside_of_slurm_there_is_nothing_to_requeue(environ):
    assert read_env(environ).job_id == ""


def test_every_start_of_a_job_has_its_own_id_and_all_its_ranks_share_it():
    first = read_env(STEP).start_id
    other_rank = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert read_env(other_rank).start_id == first
    requeued = {**STEP, "SLURM_RESTART_COUNT": "1"}
    next_step = {**STEP, "SLURM_STEP_ID": "1"}
    neighbour = {**STEP, "SLURM_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "1"}
    starts = {read_env(e).start_id for e in (STEP, requeued, next_step, neighbour)}
    assert len(starts) == 4


def test_every_start_of_a_local_job_and_of_torchruns_workers_has_its_own_id():
    again = {**LOCAL, "SUBMITIT_LOCAL_JOB_ID": "4712"}
    other = {**LOCAL, "LOSSGRID_JOB_ID": "local-000004"}
    assert len({read_env(e).start_id for e in (LOCAL, again, other)}) == 3
    assert read_env({**LOCAL, "SUBMITIT_LOCAL_GLOBALID": "0"}).start_id == read_env(LOCAL).start_id
    restarted = {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"}
    assert read_env(restarted).start_id != read_env(TORCHRUN).start_id


def test_reading_the_environment_needs_only_the_standard_library():
    code = (
        "import sys, hpc.distributed.launcher; "
        "print(*sorted({n.split('.')[0] for n in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    ours = {name for name in done.stdout.split() if name not in sys.stdlib_module_names}
    assert {name for name in ours if not name.startswith("__")} == {"hpc"}


def test_the_environment_of_this_process_is_the_default(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("SLURM", "PMI", "OMPI", "SUBMITIT", "TORCHELASTIC", "RANK")):
            monkeypatch.delenv(name)
    assert isinstance(read_env(), RankEnv)
    assert read_env().world_size == 1


@pytest.mark.parametrize(
    ("environ", "ranks", "cpus"),
    [
        ({}, 1, 12),
        ({}, 4, 3),
        ({}, 16, 1),
        ({"LOCAL_WORLD_SIZE": "2"}, 8, 6),  # torchrun on four nodes
        ({"SLURM_CPUS_PER_TASK": "10"}, 8, 10),
    ],
)
def test_a_rank_uses_its_share_of_the_cpus_of_its_node(monkeypatch, environ, ranks, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert cpus_of_rank(replace(single_process(), world_size=ranks), environ) == cpus
