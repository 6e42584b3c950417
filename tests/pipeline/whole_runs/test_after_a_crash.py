"""The power goes off while a local grid trains: the runner and all jobs are killed, for real. The
next `grid` takes up what was left, and the report shows all cells."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from data_prep.pack import pack
from hpc.scheduler.auto import open_queue
from hpc.scheduler.local_jobs import LocalJobs, processes, take_lock
from pipeline import status
from pipeline import submit as command
from pipeline.config.grid_file import Grid
from pipeline.scores.results_file import read_results
from pipeline.submission.submitter import submit
from tests.pipeline.grids import small_grid
from tests.pipeline.whole_runs.test_killed import steps_saved, wait_until

CHANGES = [
    (', "deeplabv3_mobilenet_v3_large"]', "]"),
    ('losses = ["CE", "DLNWCE"]', 'losses = ["CE"]'),
    ("epochs = 2", "epochs = 10\ncheckpoint_minutes = 0.001"),
]


@pytest.fixture
def grid(tmp_path) -> Grid:
    """Two bundles of one cell, 30 steps each."""
    grid = small_grid(tmp_path, *CHANGES)
    pack("streets", grid.datasets["streets"], processes=1)
    return grid


def kill_all(jobs: LocalJobs) -> None:
    """The runner first, so that it notes nothing."""
    runner = next(
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(jobs.folder).encode() in command_line(entry)
    )
    os.kill(runner, signal.SIGKILL)
    with (jobs.folder / "lock").open() as lock:
        wait_until(lambda: take_lock(lock))
    for lock in jobs.folder.glob("local-*.lock"):
        for pid in processes(lock):
            os.kill(pid, signal.SIGKILL)
        # a dying process keeps its lock longer than other users than root see what it has open
        with lock.open() as file:
            wait_until(lambda file=file: take_lock(file))


def command_line(process: Path) -> bytes:
    try:
        words = (process / "cmdline").read_bytes()
    except OSError:
        return b""
    return words if b"hpc.scheduler.local" in words else b""


@pytest.mark.slow
def test_reduce_and_report_of_before_the_crash_run_behind_the_cells_that_are_left(grid, capsys):
    queue = open_queue(grid.cluster, grid.run.logs, grid.run.queue)
    jobs = submit(grid, queue, ["grid", "reduce", "report"])
    wait_until(lambda: steps_saved(grid))
    kill_all(LocalJobs(grid.run.queue))

    capsys.readouterr()
    assert status.main([str(grid.path)]) == 0
    said = capsys.readouterr().out
    assert "small: 2 cells: 1 interrupted, 1 missing\n" in said, said
    assert "3 jobs wait, but no process starts them; `python -m pipeline.submit grid " in said

    assert command.main(["grid", str(grid.path), "--wait"]) == 0
    (dataset,) = read_results(grid.run.results).datasets
    assert len(dataset.cells) == 2
    assert 'name="lossgrid-cells" content="2"' in grid.run.page.read_text(encoding="utf-8")
    said = "cancelled, to run after the cells of this submission: reduce, report\n"
    assert said in capsys.readouterr().out
    outcomes = queue.job_states([*jobs["reduce"], *jobs["report"]])
    assert [job.why for job in outcomes.values()] == ["cancelled", "cancelled"]
    assert status.main([str(grid.path)]) == 0
    assert "older" not in capsys.readouterr().out
