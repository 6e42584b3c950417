"""A site lets a user have only so many jobs in the queue: what does not fit is deferred, says so,
and goes with a later submission."""

from __future__ import annotations

import time
from functools import partial

import pytest

from data_prep.pack import pack
from hpc.cli import UserError
from hpc.scheduler.base import JobState
from hpc.storage.atomic import read_json
from pipeline.cancel import cancel
from pipeline.config.grid_file import Grid
from pipeline.submission import submitter, wait
from pipeline.submission.submitter import submit, submit_deferred
from pipeline.tracking.submissions import cancellations
from pipeline.tracking.survey import STATES, survey
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import finish, small_grid
from tests.pipeline.stories import cells_of, planned

SEEDS = ("seeds = [0, 1]", "seeds = [0, 1, 2, 3, 4]")
PRETRAIN = ('weights = "none"', 'weights = "pretrain"\npretrain = {batch_size = 2}')
OTHER = """
[dataset.more]
source = "synthetic"
shards = "{}/more"
train = 6
val = 3
size = [32, 40]
"""
ALL = ("prep", "grid", "reduce", "report")


@pytest.fixture
def grid(tmp_path, streets) -> Grid:
    """Five bundles of four cells."""
    return small_grid(tmp_path, SEEDS, (f"{tmp_path}/streets", str(streets)))


@pytest.fixture
def queue(tmp_path) -> FakeQueue:
    return FakeQueue(tmp_path)


def words(grid: Grid, queue: FakeQueue) -> dict[str, int]:
    found = survey(grid, queue)
    return {state: found.count(state) for state in STATES if found.count(state)}


def test_what_does_not_fit_waits_and_says_why(grid, queue, capsys):
    queue.max_jobs = 3
    assert submit(grid, queue, ["grid"]) == {"grid": ["job1", "job2", "job3"]}
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == "submitted 3 jobs for 12 cells"
    assert said[-1].startswith("deferred: 2 jobs: you may have no more jobs in the queue")
    assert words(grid, queue) == {"waiting": 20}
    assert sorted(cell.seed for cell in survey(grid, queue).deferred) == [3] * 4 + [4] * 4
    reasons = {cell.why for cell in survey(grid, queue).cells if cell.cell.seed > 2}
    assert reasons == {
        "you may have no more jobs in the queue; --wait, or `grid` again, submits deferred jobs"
    }


def test_it_goes_with_the_next_submission_that_finds_room(grid, queue):
    queue.max_jobs = 3
    submit(grid, queue, ["grid"])
    assert submit(grid, queue, ["grid"]) == {"grid": ["job1", "job2", "job3"]}  # still no room
    finish(grid, [cell for cell in grid.cells if cell.seed == 0], "task0")
    queue.jobs["job1"] = "gone"
    assert submit(grid, queue, ["grid"]) == {"grid": ["job2", "job3", "job4"]}
    queue.max_jobs = None
    assert submit(grid, queue, ["grid"]) == {"grid": ["job2", "job3", "job4", "job5"]}
    assert words(grid, queue) == {"done": 4, "waiting": 16}
    assert not survey(grid, queue).deferred
    assert not planned(grid, queue).bundles


def test_what_comes_after_training_is_held_back_too(grid, queue, capsys):
    queue.max_jobs = 7  # one prep, five bundles, reduce
    jobs = submit(grid, queue, ALL)
    assert [len(jobs[stage]) for stage in ("prep", "grid", "reduce")] == [1, 5, 1]
    assert "report" not in jobs
    assert capsys.readouterr().out.splitlines()[-1].startswith("deferred: report: ")


def test_stages_that_move_and_find_no_room_are_sent_with_the_last_cells(grid, queue, monkeypatch):
    submit(grid, queue, ALL)
    queue.jobs |= dict.fromkeys(["job1", *(f"job{number}" for number in range(2, 7))], "gone")
    queue.max_jobs = 2
    jobs = submit(grid, queue, ["grid"])
    assert queue.cancelled == [["job7", "job8"]]
    assert "reduce" not in jobs
    assert survey(grid, queue).deferred_stages == ("reduce", "report")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(queue, "job_states", look_until_trained(grid, queue))
    again = partial(submit_deferred, grid, queue, cancellations(grid.run), "submit --wait")
    assert wait.wait_for(grid, queue, jobs, ("grid",), again) == 0
    sent = [call.module for call in queue.calls.values()][8:]
    assert sent == [*["jobs.train"] * 5, "pipeline.reduce", "pipeline.report"]
    assert survey(grid, queue).deferred_stages == ()


def test_stages_that_were_deferred_go_with_the_next_grid_but_not_after_cancel(grid, queue):
    queue.max_jobs = 5
    submit(grid, queue, ["grid", "reduce", "report"])
    assert len(queue.jobs) == 5
    queue.max_jobs = None
    jobs = submit(grid, queue, ["grid"])
    assert (jobs["reduce"], jobs["report"]) == (["job6"], ["job7"])
    assert submit(grid, queue, ["grid"]).keys() == {"grid"}
    queue.max_jobs = 5
    queue.cancel(["job6", "job7"])
    submit(grid, queue, ["reduce"])
    assert survey(grid, queue).deferred_stages == ("reduce",)
    cancel(grid, queue)
    assert survey(grid, queue).deferred_stages == ()


def test_stages_that_move_are_not_lost_if_the_queue_refuses_the_cells(grid, queue, monkeypatch):
    submit(grid, queue, ["grid", "reduce"])
    queue.jobs["job1"] = "gone"
    take = queue.submit

    def refuse(*arguments):
        raise UserError("sbatch refused the job")

    monkeypatch.setattr(queue, "submit", refuse)
    with pytest.raises(UserError, match="refused"):
        submit(grid, queue, ["grid"])
    monkeypatch.setattr(queue, "submit", take)
    assert "reduce" in submit(grid, queue, ["grid"])


def test_a_report_that_was_deferred_needs_the_reduction_that_was_not(grid, queue):
    queue.max_jobs = 7  # one prep, five bundles, reduce
    submit(grid, queue, ALL)
    queue.jobs["job1"] = "gone"  # prep
    sent = submit_deferred(
        grid, queue, cancellations(grid.run), "submit --wait", ["grid", "report"]
    )
    assert queue.calls["job7"].module == "pipeline.reduce"
    assert sent["report"] == ["job8"]
    assert queue.needs["job8"] == ["job7"]


def test_a_report_that_was_deferred_needs_the_reduction_that_moves(grid, queue):
    """Behind cells that turn out to be missing, such as those of a damaged file of counts."""
    counts = finish(grid, [cell for cell in grid.cells if cell.seed == 0], "task0")
    queue.max_jobs = 5  # four bundles, reduce
    submit(grid, queue, ["grid", "reduce", "report"])
    counts.unlink()
    queue.max_jobs = None
    sent = submit_deferred(
        grid, queue, cancellations(grid.run), "submit --wait", ["grid", "report"]
    )
    assert queue.cancelled == [["job5"]]
    assert queue.after[sent["reduce"][0]] == ["job1", "job2", "job3", "job4", "job6"]
    assert queue.needs[sent["report"][0]] == sent["reduce"]


def test_a_bundle_does_not_go_before_its_backbone(tmp_path, streets, queue):
    grid = small_grid(tmp_path, SEEDS, PRETRAIN, (f"{tmp_path}/streets", str(streets)))
    queue.max_jobs = 0
    assert submit(grid, queue, ["grid"]) == {"grid": []}
    queue.max_jobs = 2
    assert submit(grid, queue, ["grid"]) == {"grid": ["job1", "job2"]}
    modules = [call.module for call in queue.calls.values()]
    assert modules == ["jobs.pretrain", "jobs.train"]
    assert queue.needs["job2"] == ["job1"]


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_waiting_sends_the_rest_as_jobs_end(grid, queue, monkeypatch, limit):
    """With `--wait` every cell is trained, and the stages after it run once, with never more jobs
    than allowed."""
    queue.max_jobs = limit
    most = []

    def job_states(ids):
        most.append(sum(state != "gone" for state in queue.jobs.values()))
        alive = [job for job, state in queue.jobs.items() if state != "gone"]
        if alive and len(most) % 3 == 0:  # every third question finds a job ended
            words = queue.calls[alive[0]].arguments[0]
            cells = [cell for cell in grid.cells if f"seed{cell.seed}-" in words]
            if cells:  # and not a stage
                finish(grid, cells, f"task{alive[0]}")
            queue.jobs[alive[0]] = "gone"
        return {job: JobState(queue.jobs.get(job, "gone")) for job in ids}

    monkeypatch.setattr(queue, "job_states", job_states)
    monkeypatch.setattr(queue, "ensure_runner", lambda: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    jobs = submit(grid, queue, ALL)
    assert wait.wait_for(grid, queue, jobs, ALL, lambda stages: submit(grid, queue, stages)) == 0
    assert words(grid, queue) == {"done": 20}
    assert [call.module for call in queue.calls.values()] == [
        "data_prep.pack", *["jobs.train"] * 5, "pipeline.reduce", "pipeline.report"
    ]  # fmt: skip
    assert max(most) == limit


def test_a_poll_that_sends_nothing_writes_and_prints_nothing(grid, queue, monkeypatch, capsys):
    """The user's other jobs fill the queue. Counts are not read again either."""
    queue.max_jobs = 1
    jobs = submit(grid, queue, ["grid"])
    finish(grid, cells_of(queue, "job1"), "task1")
    queue.jobs |= {"job1": "gone", "other": "running"}
    capsys.readouterr()
    files, printed = [], []

    def sleep(seconds):
        files.append({p: p.stat().st_mtime_ns for p in grid.run.root.rglob("*") if p.is_file()})
        printed.append(capsys.readouterr().out)
        if len(files) == 5:
            queue.max_jobs = None

    def refuse(folder):
        raise AssertionError("counts were verified again")

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(submitter, "set_aside_altered", refuse)
    again = partial(submit_deferred, grid, queue, cancellations(grid.run), "submit --wait")
    monkeypatch.setattr(queue, "job_states", look_until_trained(grid, queue))
    assert wait.wait_for(grid, queue, jobs, ("grid",), again) == 0
    assert all(found == files[0] for found in files[:5])
    assert printed[:5] == [""] * 5


def look_until_trained(grid: Grid, queue: FakeQueue):
    """The queue's `job_states`, after which every job of ours has ended well."""

    def job_states(ids):
        for job in [job for job in ids if queue.jobs.get(job) == "waiting"]:
            if queue.calls[job].module == "jobs.train":
                finish(grid, cells_of(queue, job), f"task{job}")
            queue.jobs[job] = "gone"
        return {job: JobState(queue.jobs.get(job, "gone")) for job in ids}

    return job_states


def test_what_is_deferred_is_noted_once(grid, queue, capsys):
    """A record of thousands of deferred jobs is large, and jobs may end at every poll."""
    queue.max_jobs = 1
    submit(grid, queue, ["grid"])
    (first,) = grid.run.submitted.iterdir()
    finish(grid, cells_of(queue, "job1"), "task1")
    queue.jobs["job1"] = "gone"
    capsys.readouterr()
    submit_deferred(grid, queue, cancellations(grid.run), "submit --wait", ["grid"])
    assert capsys.readouterr().err == ""  # the data set was warned about before
    (second,) = set(grid.run.submitted.iterdir()) - {first}
    assert len(read_json(second)["tasks"]) == 1
    assert words(grid, queue) == {"done": 4, "waiting": 16}
    assert len(survey(grid, queue).deferred) == 12


def test_a_job_that_ends_while_another_data_set_is_packed_makes_room(tmp_path, grid, queue):
    submit(grid, queue, ["grid"])
    both = small_grid(
        tmp_path, SEEDS, (f"{tmp_path}/streets", grid.datasets["streets"].shards),
        more=OTHER.format(tmp_path),
    )  # fmt: skip
    queue.max_jobs = 6
    assert submit(both, queue, ["prep", "grid"])["prep"] == ["job6"]
    queue.jobs |= {"job1": "gone", "job6": "running"}
    finish(grid, cells_of(queue, "job1"), "task1")
    submit_deferred(both, queue, cancellations(both.run), "submit --wait", ["grid"])
    assert {cell.dataset for cell in cells_of(queue, "job7")} == {"more"}
    assert queue.needs["job7"] == ["job6"]


def test_pre_trainings_are_one_array(tmp_path, streets, queue, monkeypatch):
    """One call of sbatch for all of them, and one for the bundles that wait for each."""
    grid = small_grid(
        tmp_path, PRETRAIN, (f"{tmp_path}/streets", str(streets)), more=OTHER.format(tmp_path)
    )
    pack("more", grid.datasets["more"], processes=1)
    sent = []
    one = queue.submit
    monkeypatch.setattr(
        queue, "submit", lambda calls, *a: sent.append(len(calls)) or one(calls, *a)
    )
    submit(grid, queue, ["grid"])
    assert sent == [2, 2, 2]
    assert {queue.needs[job][0] for job in queue.jobs if queue.needs[job]} == {"job1", "job2"}
