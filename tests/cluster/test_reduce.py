"""`reduce` over the nodes of a cluster, whichever way their MPI finds its ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.pack import pack
from hpc.storage.atomic import file_sha256
from pipeline.config.grid_file import Grid
from tests.cluster.slurm_cluster import PYTHON
from tests.hpc.distributed.test_mpi import OPEN_MPI_LIBRARY, needs_open_mpi
from tests.pipeline.grids import finish, small_grid

pytestmark = pytest.mark.slow

# as many on each node: MPICH cannot start three beside one
SRUN = ("srun", "--nodes=2", "--ntasks-per-node=2")


@pytest.fixture(scope="module")
def reduced(cluster) -> tuple[Grid, str]:
    """A grid of eight cells in three files of counts; one cell is missing. And the hash of what
    one rank makes of it."""
    folder = cluster.runs / "reduce"
    folder.mkdir()
    grid = small_grid(folder)
    pack("streets", grid.datasets["streets"], processes=1)
    for task in range(3):
        finish(grid, grid.cells[task:-1:3], f"task{task}")
    lines = cluster.answer(PYTHON, "-m", "pipeline.reduce", grid.path).splitlines()
    assert lines[-1] == f"missing: {grid.cells[-1].name}"
    return grid, file_sha256(grid.run.results)


def reduce(cluster, grid: Grid, *options: str, library: str = ""):
    Path(grid.run.results).unlink(missing_ok=True)
    environ = {"MPI4PY_LIBMPI": library} if library else {}
    command = (*SRUN, *options, PYTHON, "-m", "pipeline.reduce", grid.path)
    return cluster.command(*command, **environ)


def assert_same_result(done, grid: Grid, expected: str) -> None:
    assert done.returncode == 0, done.stderr
    assert f": {len(grid.cells) - 1} of {len(grid.cells)} cells\n" in done.stdout
    assert done.stdout.endswith(f"missing: {grid.cells[-1].name}\n")
    assert done.stdout.count("missing: ") == 1, "one rank writes"
    assert file_sha256(grid.run.results) == expected


def test_over_two_nodes_with_pmi2(cluster, reduced):
    grid, expected = reduced
    assert_same_result(reduce(cluster, grid, "--mpi=pmi2"), grid, expected)


@needs_open_mpi
def test_over_two_nodes_with_pmix(cluster, reduced):
    grid, expected = reduced
    done = reduce(cluster, grid, "--mpi=pmix", library=OPEN_MPI_LIBRARY)
    assert_same_result(done, grid, expected)


@pytest.mark.parametrize(
    ("mpi", "why"),
    [
        ("none", "srun started 4 tasks without MPI"),
        ("pmix", "the launcher announced 4 ranks, in PMIx, which this MPI does not speak"),
    ],
)
def test_four_worlds_of_one_are_refused(cluster, reduced, mpi, why):
    grid, _ = reduced
    done = reduce(cluster, grid, f"--mpi={mpi}")
    assert done.returncode == 2
    assert f"error: {why}" in done.stderr
    assert not grid.run.results.exists()
