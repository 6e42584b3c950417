"""A submission dies when the queue has its jobs and no record tells which: they are found by the
token that was recorded before, and nothing is sent twice."""

from __future__ import annotations

import pytest

from pipeline import logs, status
from pipeline.cancel import cancel
from pipeline.config.grid_file import Grid
from pipeline.submission.submitter import submit
from pipeline.tracking.submissions import submissions
from pipeline.tracking.survey import survey
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import finish, small_grid
from tests.pipeline.stories import cells_of, words

PRETRAIN = ('weights = "none"', 'weights = "pretrain"\npretrain = {batch_size = 2}')


class Dying(FakeQueue):
    """The submission dies once the queue has taken as many sendings as `lives`."""

    lives = 1

    def submit(self, *arguments, **options) -> list[str]:
        jobs = super().submit(*arguments, **options)
        self.lives -= 1
        if self.lives == 0:
            raise KeyboardInterrupt
        return jobs


@pytest.fixture
def grid(tmp_path, streets) -> Grid:
    """Two bundles of four cells."""
    return small_grid(tmp_path, (f"{tmp_path}/streets", str(streets)))


@pytest.fixture
def queue(tmp_path) -> Dying:
    return Dying(tmp_path)


def die(grid: Grid, queue: Dying) -> None:
    with pytest.raises(KeyboardInterrupt):
        submit(grid, queue, ["grid"])
    queue.asked_for.clear()


def recorded(grid: Grid) -> list[str]:
    return [task.job for task in submissions(grid.run)]


def test_the_jobs_are_found_and_noted_and_nothing_is_sent_twice(grid, queue):
    die(grid, queue)
    assert recorded(grid) == ["", ""]
    assert words(grid, queue) == {"waiting": 8}
    assert {cell.job for cell in survey(grid, queue).cells} == {"job1", "job2"}
    assert submit(grid, queue, ["grid"]) == {"grid": ["job1", "job2"]}
    assert list(queue.jobs) == ["job1", "job2"]
    assert recorded(grid) == ["job1", "job2"]
    queue.asked_for.clear()
    assert words(grid, queue) == {"waiting": 8}
    assert queue.asked_for == [], "what is noted is not asked for again"


def test_status_changes_nothing(grid, queue, monkeypatch, capsys):
    monkeypatch.setattr(status, "open_queue", lambda *_, **__: queue)
    die(grid, queue)
    assert status.main([str(grid.path)]) == 0
    assert "8 waiting" in capsys.readouterr().out
    assert recorded(grid) == ["", ""]


def test_a_pre_training_is_found_too_and_bundles_wait_for_it(tmp_path, streets, queue):
    grid = small_grid(tmp_path, PRETRAIN, (f"{tmp_path}/streets", str(streets)))
    die(grid, queue)
    assert list(queue.jobs) == ["job1"], "it died between the pre-training and the bundles"
    assert submit(grid, queue, ["grid"])["grid"] == ["job1", "job2", "job3"]
    assert queue.needs["job2"] == queue.needs["job3"] == ["job1"]


def test_what_the_queue_does_not_know_was_not_sent_or_is_forgotten(grid, queue):
    """Or the site strips comments: then jobs are sent twice, and their generations decide."""
    die(grid, queue)
    queue.tokens.clear()
    assert words(grid, queue) == {"missing": 8}
    assert submit(grid, queue, ["grid"]) == {"grid": ["job3", "job4"]}
    queue.asked_for.clear()
    assert words(grid, queue) == {"waiting": 8}
    assert queue.asked_for == [], "it is settled, and not asked again"


def test_of_a_lost_job_that_ended_the_cells_are_sent_again(grid, queue):
    die(grid, queue)
    queue.jobs["job1"], queue.why["job1"] = "gone", "FAILED"
    queue.log("job1").write_text("error: no room\n")
    assert words(grid, queue) == {"failed": 4, "waiting": 4}
    lost = cells_of(queue, "job1")
    assert submit(grid, queue, ["grid"]) == {"grid": ["job2", "job3"]}
    assert cells_of(queue, "job3") == lost
    finish(grid, grid.cells, "task")
    assert words(grid, queue) == {"done": 8}


def test_lost_jobs_are_cancelled_like_others(grid, queue):
    die(grid, queue)
    assert cancel(grid, queue)[0] == "cancelled 2 jobs"
    assert queue.cancelled == [["job1", "job2"]]
    assert {cell.cause for cell in survey(grid, queue).cells} == {"cancelled"}


def test_a_lost_stage_has_logs(grid, queue):
    with pytest.raises(KeyboardInterrupt):
        submit(grid, queue, ["reduce"])
    assert logs.jobs_of(grid, queue, "reduce") == ("reduce", ["job1"])
    assert survey(grid, queue).stages == {"job1": "reduce"}
