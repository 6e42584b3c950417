"""MPI ranks work together, one rank needs no MPI, and a launcher of another MPI is refused."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpc.cli import UserError
from hpc.distributed.launcher import announced_mpi_size
from hpc.distributed.mpi import world

REPOSITORY = Path(__file__).parents[3]
MPIEXEC = Path(sys.executable).parent / "mpiexec"
OPEN_MPI = shutil.which("mpiexec.openmpi") or shutil.which("orterun")
OPEN_MPI_LIBRARY = ctypes.util.find_library("mpi") if OPEN_MPI else None
WITHOUT_LAUNCHER = {
    k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI", "SLURM"))
}
needs_mpiexec = pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python")


needs_open_mpi = pytest.mark.skipif(OPEN_MPI_LIBRARY is None, reason="no Open MPI beside ours")


def _ranks(
    count: int, code: str, mpiexec: str | Path = MPIEXEC, library: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `code` on ranks started by `mpiexec`, with another MPI library if one is given."""
    options = ["--allow-run-as-root", "--oversubscribe"] if mpiexec == OPEN_MPI else []
    line = [mpiexec, *options, "-n", str(count), sys.executable, "-c", code]
    environ = {**WITHOUT_LAUNCHER, **({"MPI4PY_LIBMPI": library} if library else {})}
    return subprocess.run(
        line, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=60
    )


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
def test_launchers_announce_their_number_of_ranks(environ, size):
    assert announced_mpi_size(environ) == size


def test_one_process_needs_no_mpi():
    code = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "from hpc.distributed.mpi import world; w = world({})\n"
        "print(w.rank, w.size, w.gather(w.bcast('a')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0 1 ['a']"


def test_one_rank_has_all_rows_already():
    ours = np.arange(6, dtype=np.int64).reshape(2, 3)
    world({}).rows_to_root([ours], np.array([1, 0]))
    np.testing.assert_array_equal(ours, [[0, 1, 2], [3, 4, 5]])


@needs_mpiexec
def test_ranks_broadcast_and_gather():
    done = _ranks(
        3,
        "import numpy as np; from hpc.distributed.mpi import world\n"
        "w = world()\n"
        "word = w.bcast('from 0' if w.rank == 0 else None)\n"
        "ranks = w.gather((w.rank, word)); w.barrier()\n"
        "assert (ranks is None) == (w.rank > 0)\n"
        "if w.rank == 0: print(w.size, ranks)\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3 [(0, 'from 0'), (1, 'from 0'), (2, 'from 0')]"


@needs_mpiexec
@pytest.mark.parametrize("width", [5, 60_000, 300_000])  # all in a message, two rows, and one
def test_rows_of_all_ranks_come_to_their_places(width):
    """Two ranks have every other row, a third has none."""
    done = _ranks(
        3,
        "import numpy as np; from hpc.distributed.mpi import world\n"
        f"w = world(); width = {width}\n"
        "whole = np.arange(7 * 2 * width).reshape(7, 2, width) + 2**40\n"
        "mine = np.arange(w.rank, 7, 2)[::-1] if w.rank < 2 else np.arange(0)\n"
        "array = np.full_like(whole, -1)\n"
        "if w.rank == 0: array[mine] = whole[mine]\n"
        "else: array[:len(mine)] = whole[mine]\n"
        "short, before = array[:, 0, :1].copy(), array.copy()\n"
        "w.rows_to_root([array, short], mine)\n"
        "right = (array == (whole if w.rank == 0 else before)).all()\n"
        "said = w.gather(bool(right and (short == array[:, 0, :1]).all()))\n"
        "if w.rank == 0: print(said)\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[True, True, True]"


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
        "from hpc.distributed.mpi import world; from hpc.cli import UserError\n"
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
        "from hpc.distributed.mpi import world; from hpc.cli import UserError\n"
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


COMMAND = (
    "import os; from hpc.cli import run; from hpc.distributed.mpi import world\n"
    "def main(arguments):\n"
    "    ranks = world(); line = f'of {ranks.size} {sum(ranks.gather(1) or [0])}\\n'\n"
    "    os.write(1, line.encode())\n"  # at once: the lines of two ranks do not mix
    "run(main)\n"
)


def _errors(done: subprocess.CompletedProcess[str]) -> set[str]:
    return {line for line in done.stderr.splitlines() if line.startswith("error: ")}


@needs_mpiexec
@needs_open_mpi
def test_our_mpi_under_the_mpiexec_of_open_mpi_stops_before_it_starts():
    """Without the check, MPICH would end the process with an error of its own."""
    done = _ranks(2, COMMAND, OPEN_MPI)
    assert done.returncode == 2
    (line,) = _errors(done)
    assert "announced 2 ranks, in PMIx, which this MPI does not speak (MPICH" in line
    assert "launcher and mpi4py belong to different MPIs; use the mpiexec of the MPI" in line
    assert "Traceback" not in done.stderr and "of 1" not in done.stdout


@needs_mpiexec
@needs_open_mpi
def test_open_mpi_under_the_mpiexec_of_mpich_is_not_many_worlds_of_one():
    done = _ranks(2, COMMAND, library=OPEN_MPI_LIBRARY)
    assert done.returncode == 2
    (line,) = _errors(done)
    assert "announced 2 ranks, but MPI sees 1 (Open MPI" in line
    assert set(done.stderr.splitlines()) == {line}
    assert done.stdout == ""


@needs_open_mpi
def test_open_mpi_under_its_own_mpiexec_works():
    done = _ranks(2, COMMAND, OPEN_MPI, OPEN_MPI_LIBRARY)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["of 2 0", "of 2 2"]


@needs_mpiexec
def test_ranks_without_a_library_to_load_are_told_which():
    done = _ranks(2, COMMAND, library="/nowhere/libmpi.so")
    assert done.returncode == 2
    (line,) = _errors(done)
    assert line.startswith("error: 2 ranks were launched, but mpi4py does not load (")
    assert "/nowhere/libmpi.so" in line
    assert line.endswith("install the `mpich` wheel, or start a single process")
    assert set(done.stderr.splitlines()) == {line}


def test_tasks_of_srun_without_mpi_are_refused():
    with pytest.raises(UserError, match=r"srun started 4 tasks without MPI.*--mpi=pmix"):
        world({"SLURM_STEP_NUM_TASKS": "4", "SLURM_MPI_TYPE": "none"})
    assert world({"SLURM_STEP_NUM_TASKS": "1"}).size == 1
