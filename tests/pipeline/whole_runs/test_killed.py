"""One of two ranks is killed, for real, on the local queue: it is told as that, shown in the logs,
and `retry` goes on from the checkpoint."""

from __future__ import annotations

import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from hpc.scheduler.auto import open_queue
from hpc.scheduler.job import START_PREFIX
from hpc.scheduler.local_jobs import LocalJobs, processes
from pipeline import cancel, logs, retry
from pipeline.config.grid_file import Grid
from pipeline.submission.submitter import submit
from pipeline.tracking.survey import CellState, survey
from tests.jobs.small_runs import steps_saved
from tests.pipeline.grids import small_grid

SECONDS = 500  # on a machine with other work, torch alone takes minutes to import
CHANGES = [
    ("seeds = [0, 1]", "seeds = [0]"),
    (', "deeplabv3_mobilenet_v3_large"]', "]"),
    ('losses = ["CE", "DLNWCE"]', 'losses = ["CE"]'),
    ("epochs = 2", "epochs = 20"),
]
OFTEN = ("threads = 1", "threads = 1\ncheckpoint_minutes = 0.001")
TWO_RANKS = ('kind = "local"', 'kind = "local"\ntasks_per_node = 2')


@pytest.fixture
def new_grid(tmp_path, shards):
    """A function that makes a grid of one cell, trained in 60 steps."""
    return partial(small_grid, tmp_path, *CHANGES)


def wait_until(happened) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks(grid: Grid, job: str) -> dict[int, int]:
    """The process of each rank of a job; its loaders, which come later, have its environment."""
    found = {}
    for pid in sorted(processes(LocalJobs(grid.run.queue).path(job, "lock"))):
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        if rank := re.search(rb"\0SUBMITIT_LOCAL_GLOBALID=(\d+)", environment):
            found.setdefault(int(rank.group(1)), pid)
    return found


def cell_of(grid: Grid) -> CellState:
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue)
    return survey(grid, queue).cells[0]


def start(grid: Grid) -> str:
    """Submit one job and return it."""
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue)
    (job,) = submit(grid, queue, ["grid"])["grid"]
    return job


@pytest.mark.slow
def test_a_killed_rank_is_told_and_the_cell_goes_on(new_grid, capsys):
    grid = new_grid(OFTEN, TWO_RANKS)
    job = start(grid)
    wait_until(lambda: steps_saved(grid))
    os.kill(ranks(grid, job)[1], signal.SIGKILL)
    wait_until(lambda: cell_of(grid).cause not in ("", "unknown"))
    state = cell_of(grid)
    assert (state.state, state.cause, state.why) == ("interrupted", "killed", "killed")
    saved = max(steps_saved(grid))
    assert 0 < saved < 60

    capsys.readouterr()
    assert logs.main(["CE", str(grid.path)]) == 0
    said = capsys.readouterr().out
    assert f"job {job}, 2 ranks" in said
    assert said.count(START_PREFIX) == 0  # only what came after it
    assert retry.main([str(grid.path), "--wait"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "1 cell: killed: again"
    assert cell_of(grid).state == "done"
    assert f"resuming at step {saved}" in all_logs(grid)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_told_as_cancelled(new_grid, capsys):
    grid = new_grid(("epochs = 20", "epochs = 2000"))
    job = start(grid)
    wait_until(lambda: "starting at step 0" in all_logs(grid))
    assert cancel.main([str(grid.path)]) == 0
    assert "cancelled 1 jobs" in capsys.readouterr().out
    wait_until(lambda: cell_of(grid).state != "running")
    state = cell_of(grid)
    (saved,) = steps_saved(grid)
    assert 0 < saved < 6000  # no interval had passed: the signal alone made it save
    assert (state.state, state.cause, state.job) == ("interrupted", "cancelled", job)
    assert "stopped by SIGTERM after step" in all_logs(grid)
    assert retry.main([str(grid.path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to submit again"


def all_logs(grid: Grid) -> str:
    return "".join(path.read_text() for path in sorted(grid.run.logs.rglob("*_log.err")))
