"""A rank of the reduction is killed: the job ends, older results stay, and the next one gives the
bytes that it gives undisturbed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from data_prep.pack import pack
from pipeline.config.grid_file import Grid
from pipeline.scores.results_file import read_results
from pipeline.tracking.submissions import submissions
from tests.cluster.slow_reduction import HALT, READING, WRITING, halted
from tests.cluster.slurm_cluster import PROFILE, PYTHON, until
from tests.pipeline.grids import finish, small_grid

pytestmark = pytest.mark.slow

BOUND = 120.0  # seconds; Slurm ends a step that has lost a rank in some, a busy machine takes more


@pytest.fixture(scope="module")
def profile(cluster) -> Path:
    """Two nodes with two ranks each."""
    path = cluster.runs / "reducing.toml"
    path.write_text(f"reduce_nodes = 2\nreduce_tasks_per_node = 2\n{PROFILE.read_text()}")
    return path


@pytest.fixture(scope="module")
def grid(cluster) -> Grid:
    """Eight cells, of which four have been counted."""
    folder = cluster.runs / "reduce-faults"
    folder.mkdir()
    grid = small_grid(folder)
    pack("streets", grid.datasets["streets"], processes=1)
    finish(grid, grid.cells[:4], "task0")
    return grid


@pytest.fixture(scope="module")
def results(cluster, grid) -> tuple[bytes, bytes]:
    """Return the results of one rank for four cells, and for all once they have counts."""
    reduce = [PYTHON, "-m", "pipeline.reduce", grid.path]
    cluster.answer(*reduce)
    before = grid.run.results.read_bytes()
    for task, cells in (("task1", grid.cells[4:6]), ("task2", grid.cells[6:])):
        finish(grid, cells, task)
    cluster.answer(*reduce)
    return before, grid.run.results.read_bytes()


def submit(cluster, grid: Grid, profile: Path) -> str:
    command = [PYTHON, "-m", "tests.cluster.slow_reduction", "reduce", grid.path]
    cluster.answer(*command, "--cluster", profile)
    return list(submissions(grid.run))[-1].job


@pytest.mark.parametrize(("place", "there", "struck"), [(READING, 4, 3), (WRITING, 1, 0)])
def test_a_rank_that_is_killed(cluster, grid, profile, results, place, there, struck):
    before, expected = results
    grid.run.results.write_bytes(before)
    halt = grid.run.root / HALT
    halt.write_text(place)
    job = submit(cluster, grid, profile)
    until(lambda: len(halted(grid.run.root, place)) == there, f"{there} ranks are {place}")
    assert len(cluster.nodes_of(job)) == 2
    cluster.ranks(job)[struck].send(signal.SIGKILL)
    cluster.wait_for_state(job, "FAILED", seconds=BOUND)
    assert grid.run.results.read_bytes() == before
    assert len(read_results(grid.run.results).record["missing"]) == 4

    halt.unlink()
    again = submit(cluster, grid, profile)
    cluster.wait_until_gone(again)
    assert cluster.state(again) == "COMPLETED"
    assert grid.run.results.read_bytes() == expected
