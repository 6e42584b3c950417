"""Ranks that work together, the one rank without MPI, and launchers that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpc.command import UserError
from hpc.mpi import launched_size, world

REPOSITORY = Path(__file__).parents[2]
MPIEXEC = Path(sys.executable).parent / "mpiexec"
needs_mpiexec = pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python")


def _ranks(count: int, code: str) -> subprocess.CompletedProcess[str]:
    line = [MPIEXEC, "-n", str(count), sys.executable, "-c", code]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(
    ("environ", "size"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "8"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_MPI_TYPE": "none"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_MPI_TYPE": "pmix"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "8", "PMIX_RANK": "2"}, 8),
        ({"SLURM_NTASKS": "8", "SLURM_MPI_TYPE": "pmix"}, None),  # a batch script: one process
    ],
)
def test_what_launchers_announce(environ, size):
    assert launched_size(environ) == size


def test_one_process_needs_no_mpi():
    code = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "from hpc.mpi import world; w = world({}); print(w.rank, w.size, w.gather(w.bcast('a')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0 1 ['a']"


def test_the_sum_of_one_rank_is_its_own_array():
    ours = np.arange(6, dtype=np.int64).reshape(2, 3)
    total = world({}).sum_to_root(ours)
    np.testing.assert_array_equal(total, ours)
    assert total is not ours


@needs_mpiexec
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_broadcast_gather_and_sum(count):
    done = _ranks(
        count,
        "import numpy as np; from hpc.mpi import world\n"
        "w = world()\n"
        "word = w.bcast('from 0' if w.rank == 0 else None)\n"
        "total = w.sum_to_root(np.full((2, 2), 2**40 + w.rank))\n"
        "ranks = w.gather((w.rank, word)); w.barrier()\n"
        "assert (total is None) == (ranks is None) == (w.rank > 0)\n"
        "if w.rank == 0: print(w.size, total.tolist(), ranks)\n",
    )
    assert done.returncode == 0, done.stderr
    cell = count * 2**40 + sum(range(count))
    ranks = [(rank, "from 0") for rank in range(count)]
    assert done.stdout.strip() == f"{count} {[[cell, cell], [cell, cell]]} {ranks}"


@needs_mpiexec
@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        ("UserError('data/x is damaged')", 2, "error: data/x is damaged"),
        ("ValueError('a bug')", 1, "rank 1 of 2 failed:"),
    ],
)
def test_an_error_on_one_rank_ends_them_all(error, code, shown):
    done = _ranks(
        2,
        "from hpc.mpi import world; from hpc.command import UserError\n"
        "w = world()\n"
        "with w.abort_on_error():\n"
        f"    if w.rank == 1: raise {error}\n"
        "    w.barrier()\n",
    )
    assert done.returncode == code
    assert shown in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def test_the_error_of_a_single_rank_is_passed_on():
    with pytest.raises(UserError), world({}).abort_on_error():
        raise UserError("as it is")


def test_a_foreign_launcher_is_refused_instead_of_many_worlds_of_one():
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI"))}
    code = (
        "from hpc.mpi import world; from hpc.command import UserError\n"
        "try: world()\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**environ, "OMPI_COMM_WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
    )
    assert "announced 4 ranks, but MPI sees 1" in done.stdout
    assert "use the mpiexec of the MPI that mpi4py was built for" in done.stdout


def test_tasks_of_srun_without_mpi_are_refused():
    with pytest.raises(UserError, match=r"srun started 4 tasks without MPI.*--mpi=pmix"):
        world({"SLURM_STEP_NUM_TASKS": "4", "SLURM_MPI_TYPE": "none"})
    assert world({"SLURM_STEP_NUM_TASKS": "1"}).size == 1
