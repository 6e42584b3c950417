"""Prep, reduce and report beside the cells of a grid: in which order they run, and what happens to
those that an earlier submission left in the queue. The queue is made up."""

from __future__ import annotations

import os

import pytest

from hpc.scheduler.base import NO_RUNNER
from pipeline import status
from pipeline import submit as command
from pipeline.config.grid_file import Grid
from pipeline.submission.submitter import submit
from pipeline.tracking.survey import survey
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import finish, small_grid
from tests.pipeline.stories import NODE_FAILURE, cells_of, end, heartbeat, words

ALL = ("prep", "grid", "reduce", "report")
PRETRAIN = ('weights = "none"', 'weights = "pretrain"\npretrain = {batch_size = 2}')


@pytest.fixture
def grid(tmp_path, streets) -> Grid:
    """Two bundles of four cells."""
    return small_grid(tmp_path, (f"{tmp_path}/streets", str(streets)))


@pytest.fixture
def pretrained(tmp_path, streets) -> Grid:
    return small_grid(tmp_path, PRETRAIN, (f"{tmp_path}/streets", str(streets)))


@pytest.fixture
def queue(tmp_path, monkeypatch) -> FakeQueue:
    queue = FakeQueue(tmp_path)
    for module in (command, status):
        monkeypatch.setattr(module, "open_queue", lambda *_, **__: queue)
    return queue


@pytest.fixture
def shown(capsys):
    """The lines that status prints."""

    def lines(grid: Grid) -> list[str]:
        capsys.readouterr()
        assert status.main([str(grid.path)]) == 0
        return capsys.readouterr().out.splitlines()

    return lines


def test_stages_that_still_wait_move_behind_the_cells_that_are_submitted_again(grid, queue, capsys):
    submit(grid, queue, ALL)
    queue.jobs["job1"] = "gone"
    end(queue, "job2", NODE_FAILURE)
    assert command.main(["grid", str(grid.path), "--dry-run"]) == 0
    assert "stages: grid, reduce, report\n" in capsys.readouterr().out
    jobs = submit(grid, queue, ["grid"])
    assert queue.cancelled == [["job4", "job5"]]
    assert jobs == {"grid": ["job3", "job6"], "reduce": ["job7"], "report": ["job8"]}
    assert queue.after["job7"] == ["job3", "job6"]
    assert queue.needs["job8"] == ["job7"]


def test_a_submission_without_new_cells_leaves_the_stages_where_they_are(grid, queue):
    submit(grid, queue, ALL)
    submit(grid, queue, ["grid"])
    assert queue.cancelled == []
    assert len(queue.jobs) == 5


def test_all_again_has_each_stage_once(grid, queue):
    submit(grid, queue, ALL)
    jobs = submit(grid, queue, ALL)
    assert jobs == {
        "prep": ["job1"], "grid": ["job2", "job3"], "reduce": ["job6"], "report": ["job7"]
    }  # fmt: skip
    assert queue.cancelled == [["job4", "job5"]]
    assert set(queue.after["job6"]) == {"job1", "job2", "job3"}


def test_a_running_reduce_ends_before_the_next_one_starts(grid, queue):
    submit(grid, queue, ALL)
    queue.jobs |= {"job1": "gone", "job2": "gone", "job3": "gone", "job4": "running"}
    jobs = submit(grid, queue, ["grid"])
    assert queue.cancelled == [["job5"]]
    assert queue.after[jobs["reduce"][0]] == ["job6", "job7", "job4"]


def test_a_waiting_prep_serves_the_next_submission_too(grid, queue, capsys):
    submit(grid, queue, ALL)
    assert submit(grid, queue, ["prep"]) == {"prep": ["job1"]}
    assert "prep: job job1, which waits already" in capsys.readouterr().out


def test_a_running_prep_is_not_relied_on_since_it_may_have_read_images_before_their_correction(
    grid, queue, tmp_path, streets
):
    submit(grid, queue, ALL)
    queue.jobs["job1"] = "running"
    changes = (f"{tmp_path}/streets", str(streets)), ("seeds = [0, 1]", "seeds = [0, 1, 2]")
    jobs = submit(small_grid(tmp_path, *changes), queue, ["prep", "grid"])
    assert queue.after[jobs["prep"][0]] == ["job1"]
    assert queue.needs[jobs["grid"][-1]] == ["job1", *jobs["prep"]]


def test_cells_whose_prep_failed_say_so_and_are_submitted_again(grid, queue, shown):
    submit(grid, queue, ["prep", "grid"])
    assert [queue.needs[job] for job in ("job2", "job3")] == [["job1"]] * 2
    end(queue, "job1", "error: street.png is cut short; fix it", word="FAILED")
    for job in ("job2", "job3"):
        end(queue, job, word="CANCELLED")  # as accounting says it, which forgets the reason
    cells = survey(grid, queue).cells
    assert {(cell.state, cell.cause, cell.why) for cell in cells} == {
        ("failed", "error", "prep failed: error: street.png is cut short; fix it")
    }
    line = "prep failed: error: street.png is cut short; fix it, job job1; see `python -m "
    assert f"{line}pipeline.logs prep {grid.path}`" in shown(grid)
    submit(grid, queue, ["grid"])  # prep was run by hand
    assert words(grid, queue) == {"waiting": 8}
    assert queue.needs["job4"] == []


def test_cells_whose_pre_training_failed_say_so(pretrained, queue, shown):
    submit(pretrained, queue, ["grid"])
    end(queue, "job1", "error: pre-training stopped: the loss was nan", word="FAILED")
    for job in ("job2", "job3"):
        end(queue, job, word="dependency failed")
    assert {cell.why for cell in survey(pretrained, queue).cells} == {
        "pre-training failed: error: pre-training stopped: the loss was nan"
    }
    assert f"see `python -m pipeline.logs pretrain {pretrained.path}`" in "".join(shown(pretrained))


def test_a_running_pre_training_shows_how_far_it_is(pretrained, queue, shown):
    submit(pretrained, queue, ["grid"])
    queue.jobs["job1"] = "running"
    heartbeat(pretrained, queue, "job1", step=4)
    line = "pre-training: running, step 4 of 6, 0.50 steps/s, 0:00:04 left, job job1"
    assert line in shown(pretrained)


def test_a_pre_training_whose_job_only_the_queue_knows_may_wait_or_run(
    pretrained, queue, shown, monkeypatch
):
    """The submission died before it noted the job, and the queue cannot be asked."""
    monkeypatch.setattr(queue, "submit", die)
    with pytest.raises(KeyboardInterrupt):
        submit(pretrained, queue, ["grid"])
    queue.unreachable = "there is no sbatch on PATH"
    assert "pre-training: unknown" in shown(pretrained)


def die(*arguments) -> None:
    raise KeyboardInterrupt


def test_a_failed_reduce_is_named_until_results_are_newer(grid, queue, shown):
    submit(grid, queue, ["reduce", "report"])
    end(queue, "job1", "error: no counts", word="FAILED")
    end(queue, "job2", word="dependency failed")
    command = f"`python -m pipeline.logs reduce {grid.path}`"
    failed = f"reduce failed: error: no counts, job job1; see {command}"
    assert [line for line in shown(grid) if " failed" in line] == [failed]
    grid.run.results.touch()
    assert failed not in shown(grid)


def test_jobs_that_nobody_starts_do_not_wait(grid, queue, shown):
    """As the local queue tells it after the power was off."""
    submit(grid, queue, ["grid", "reduce"])
    end(queue, "job1", word="failed")
    queue.why |= dict.fromkeys(["job2", "job3"], NO_RUNNER)
    heartbeat(grid, queue, "job1", step=2)
    assert words(grid, queue) == {"interrupted": 4, "missing": 4}
    lines = shown(grid)
    command = f"`python -m pipeline.submit grid {grid.path}` does"
    assert f"2 jobs wait, but no process starts them; {command}" in lines
    assert f"reduce: waiting ({NO_RUNNER}), job job3" in lines
    jobs = submit(grid, queue, ["grid"])
    assert jobs["grid"] == ["job2", "job4"]  # the one is started again, not sent again
    assert len(cells_of(queue, "job4")) == 4
    assert queue.runner_calls == 1


def test_results_and_page_that_are_older_than_counts_are_named(grid, queue, shown):
    os.utime(finish(grid, grid.cells[:2], "task0"), (0, 0))
    assert not [line for line in shown(grid) if "older" in line]
    grid.run.report.mkdir()
    for path, hour in ((grid.run.page, 1), (grid.run.results, 2)):
        path.touch()
        os.utime(path, (3600 * hour, 3600 * hour))
    finish(grid, grid.cells[2:3], "task1")
    command = f"`python -m pipeline.submit reduce {grid.path}`"
    assert shown(grid)[-3:-1] == [
        f"results.h5 is older than the counts of 1 cells; {command} updates it",
        f"the page is older than results.h5; {command.replace('reduce', 'report')} updates it",
    ]
