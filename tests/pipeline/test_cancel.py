"""A grid is cancelled: its jobs end, what was deferred stays, and `grid` goes on."""

from __future__ import annotations

from functools import partial

import pytest

from hpc.cli import UserError
from pipeline import cancel as command
from pipeline import status
from pipeline.cancel import cancel
from pipeline.config.grid_file import Grid
from pipeline.submission import wait
from pipeline.submission.submitter import submit, submit_deferred
from pipeline.tracking.submissions import cancellations
from pipeline.tracking.survey import survey
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import finish, small_grid
from tests.pipeline.stories import cells_of, heartbeat, save, words

ALL = ("prep", "grid", "reduce", "report")
PRETRAIN = ('weights = "none"', 'weights = "pretrain"\npretrain = {batch_size = 2}')


@pytest.fixture
def grid(tmp_path, streets) -> Grid:
    """Two bundles of four cells."""
    return small_grid(tmp_path, (f"{tmp_path}/streets", str(streets)))


@pytest.fixture
def queue(tmp_path, monkeypatch) -> FakeQueue:
    queue = FakeQueue(tmp_path)
    for module in (command, status):
        monkeypatch.setattr(module, "open_queue", lambda *_, **__: queue)
    return queue


def test_all_jobs_end_by_one_call(grid, queue, capsys):
    submit(grid, queue, ALL)
    assert command.main([str(grid.path)]) == 0
    assert queue.cancelled == [["job1", "job2", "job3", "job4", "job5"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "cancelled 5 jobs, prep, reduce, report among them"
    assert lines[-1].startswith("running jobs save first; `python -m pipeline.submit grid ")
    assert words(grid, queue) == {"missing": 8}
    assert {cell.why for cell in survey(grid, queue).cells} == {"cancelled"}


def test_the_command_that_goes_on_names_the_profile_that_was_asked_for(grid, queue, capsys):
    submit(grid, queue, ["grid"])
    assert command.main([str(grid.path), "--cluster", "local"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"`python -m pipeline.submit grid {grid.path} --cluster local` " in line


def test_pre_trainings_end_too(tmp_path, streets, queue):
    grid = small_grid(tmp_path, PRETRAIN, (f"{tmp_path}/streets", str(streets)))
    submit(grid, queue, ["grid"])
    queue.jobs["job1"] = "running"
    assert cancel(grid, queue)[0] == "cancelled 3 jobs"
    assert queue.cancelled == [["job1", "job2", "job3"]]
    assert {cell.cause for cell in survey(grid, queue).cells} == {"cancelled"}


def test_what_has_ended_is_left_alone_and_grid_goes_on_from_the_checkpoint(grid, queue):
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job2")
    finish(grid, cells_of(queue, "job1"), "task1")
    queue.jobs.update(job1="gone", job2="running")
    save(grid, cells, 3)
    heartbeat(grid, queue, "job2", step=4)
    cancel(grid, queue)
    assert queue.cancelled == [["job2"]]
    assert words(grid, queue) == {"done": 4, "interrupted": 4}
    assert submit(grid, queue, ["grid"]) == {"grid": ["job3"]}
    assert cells_of(queue, "job3") == cells
    assert words(grid, queue) == {"done": 4, "waiting": 4}
    assert {cell.cause for cell in survey(grid, queue).cells} == {""}


def test_a_job_that_still_saves_is_running_and_is_not_doubled(grid, queue, monkeypatch):
    submit(grid, queue, ["grid"])
    queue.jobs["job1"] = "running"
    monkeypatch.setattr(queue, "cancel", lambda ids: None)  # it takes its time
    cancel(grid, queue)
    running = [cell for cell in survey(grid, queue).cells if cell.state == "running"]
    assert {cell.why for cell in running} == {"being cancelled"}
    submit(grid, queue, ["grid"])
    assert list(queue.jobs) == ["job1", "job2"]


def test_nothing_to_cancel_is_said(grid, queue, capsys):
    assert command.main([str(grid.path)]) == 0
    assert capsys.readouterr().out == "nothing to cancel: nothing was submitted\n"
    assert not grid.run.root.exists()
    submit(grid, queue, ["grid"])
    cancel(grid, queue)
    assert cancel(grid, queue) == ["nothing to cancel: no job waits or runs"]


def test_a_cell_takes_its_job_along_and_no_other(grid, queue):
    submit(grid, queue, ["grid"])
    lines = cancel(grid, queue, cells_of(queue, "job2")[:1])
    assert lines[:2] == [
        "cancelled 1 jobs",
        "with them end 3 other cells, which are in the same jobs",
    ]
    assert queue.cancelled == [["job2"]]
    assert words(grid, queue) == {"waiting": 4, "missing": 4}
    with pytest.raises(UserError, match="has no cell 'streets/CE'; "):
        command.main([str(grid.path), "--cell", "streets/CE"])


def test_what_was_held_back_is_not_sent_by_who_still_waits(grid, queue, monkeypatch):
    monkeypatch.setattr(queue, "ensure_runner", lambda: None)
    monkeypatch.setattr(wait, "_LINE_SECONDS", 0.0)
    queue.max_jobs = 1
    jobs = submit(grid, queue, ["grid", "reduce"])
    seen = cancellations(grid.run)
    lines = cancel(grid, queue)
    assert lines[1] == "no longer deferred: 1 jobs"
    assert not survey(grid, queue).deferred

    again = partial(submit_deferred, grid, queue, seen, "submit --wait")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="the grid was cancelled meanwhile"):
        wait.wait_for(grid, queue, jobs, ("grid", "reduce"), again)
    assert list(queue.jobs) == ["job1"]
    queue.max_jobs = None
    submit(grid, queue, ["grid"])
    assert words(grid, queue) == {"waiting": 8}


def test_a_held_cell_that_was_cancelled_is_left_out_by_who_still_waits(grid, queue):
    queue.max_jobs = 0
    submit(grid, queue, ["grid"])
    cells = survey(grid, queue).deferred
    seed1 = [cell for cell in cells if cell.seed == 1]
    assert cancel(grid, queue, seed1[:1])[0] == "cancelled 0 jobs"
    queue.max_jobs = 5
    submit_deferred(grid, queue, cancellations(grid.run), "submit --wait", ["grid"])
    assert {cell.seed for cell in cells_of(queue, "job1")} == {0}
    assert list(queue.jobs) == ["job1"]


def test_status_names_the_stages_that_wait_and_why(grid, queue, capsys):
    submit(grid, queue, ["grid", "reduce", "report"])
    queue.jobs["job3"], queue.why["job4"] = "running", "Dependency"
    capsys.readouterr()
    queue.questions = 0
    status.main([str(grid.path)])
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if not line.startswith("warning: ")]  # of the data set
    assert lines[-3:-1] == ["reduce: running, job job3", "report: waiting (Dependency), job job4"]
    assert queue.questions == 1
    assert queue.recalled == []  # no accounting
