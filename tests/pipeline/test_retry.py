"""Retry submits failed and interrupted cells again, by the exit cause of their jobs."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from hpc.cli import UserError, run
from hpc.scheduler.base import JobState
from pipeline import retry
from pipeline.cancel import cancel
from pipeline.config.grid_file import Grid
from pipeline.submission.decision import cells_to_submit
from pipeline.submission.submitter import submit
from pipeline.tracking.survey import survey
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import finish, small_grid
from tests.pipeline.stories import (
    NODE_FAILURE,
    OUT_OF_MEMORY,
    cells_of,
    diverge,
    end,
    heartbeat,
    planned,
    save,
    words,
)

PRETRAIN = ('weights = "none"', 'weights = "pretrain"\npretrain = {batch_size = 2}')
ALONE = ('kind = "local"', 'kind = "local"\ncells_per_job = 1')


@pytest.fixture
def grid(tmp_path, streets) -> Grid:
    """Two bundles of four cells."""
    return small_grid(tmp_path, (f"{tmp_path}/streets", str(streets)))


@pytest.fixture
def queue(tmp_path, monkeypatch) -> FakeQueue:
    """The queue that the command opens."""
    queue = FakeQueue(tmp_path)
    monkeypatch.setattr(retry, "open_queue", lambda *_, **__: queue)
    return queue


@pytest.fixture
def retried(capsys):
    """The lines that `pipeline.retry` prints about a grid."""

    def command(grid: Grid, *options: str) -> list[str]:
        capsys.readouterr()
        assert retry.main([str(grid.path), *options]) == 0
        return capsys.readouterr().out.splitlines()

    return command


@pytest.mark.parametrize(
    ("word", "line", "cause"),
    [
        ("NODE_FAIL", "", "node failure"),
        ("", NODE_FAILURE, "node failure"),
        ("PREEMPTED", "", "preemption"),
        ("TIMEOUT", "", "time limit"),
        ("", "srun: error: n1: task 1: Killed", "killed"),
        ("failed", "step 4 of 6", "killed"),
        ("", "step 4 of 6", "unknown"),
    ],
)
def test_who_could_not_help_it_goes_on_from_the_checkpoint(
    grid, queue, retried, word, line, cause
):  # fmt: skip
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job1")
    save(grid, cells, 3)
    heartbeat(grid, queue, "job1", step=4)
    end(queue, "job1", line, word=word)
    assert words(grid, queue) == {"waiting": 4, "interrupted": 4}
    lines = retried(grid)
    assert lines[0] == f"4 cells: {cause}: again"
    assert lines[-1] == "submitted 1 jobs for 4 cells"
    assert cells_of(queue, "job3") == cells
    assert words(grid, queue) == {"waiting": 8}
    assert retried(grid) == ["nothing to submit again"]


def test_a_dry_run_submits_nothing(grid, queue, retried):
    submit(grid, queue, ["grid"])
    end(queue, "job1", NODE_FAILURE)
    assert retried(grid, "--dry-run") == ["4 cells: node failure: again", "would submit 1 jobs"]
    assert list(queue.jobs) == ["job1", "job2"]


def test_what_was_never_tried_is_not_submitted(grid, queue, retried):
    assert retried(grid) == ["nothing to submit again"]
    assert queue.jobs == {}
    assert not grid.run.root.exists()


def test_out_of_memory_means_half_as_many_cells_until_one_does_not_fit(grid, queue, retried):
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job1")
    end(queue, "job1", OUT_OF_MEMORY)
    assert retried(grid)[0] == "4 cells: out of memory: again, at most 2 in a job"
    assert [cells_of(queue, job) for job in ("job3", "job4")] == [cells[:2], cells[2:]]
    end(queue, "job4", OUT_OF_MEMORY)
    assert retried(grid)[0] == "2 cells: out of memory: again, at most 1 in a job"
    assert [cells_of(queue, job) for job in ("job5", "job6")] == [cells[2:3], cells[3:]]
    end(queue, "job5", OUT_OF_MEMORY)
    lines = retried(grid)
    assert lines[0].startswith("1 cell: out of memory: not submitted; they do not fit into ")
    assert lines[1] == f"  {cells[2].name}: {OUT_OF_MEMORY}"
    assert list(queue.jobs) == [f"job{number}" for number in range(1, 7)]


def test_the_smaller_size_is_remembered_when_its_reason_is_not(grid, queue, retried, tmp_path):
    """Slurm forgets, logs are deleted, and the halves end for another cause."""
    submit(grid, queue, ["grid"])
    end(queue, "job1", word="OUT_OF_MEMORY")
    retried(grid)
    for path in tmp_path.glob("*.err"):
        path.unlink()
    queue.why.clear()
    end(queue, "job3", NODE_FAILURE)
    end(queue, "job4", NODE_FAILURE)
    retried(grid)
    assert [len(cells_of(queue, job)) for job in ("job5", "job6")] == [2, 2]


def test_grid_does_not_repeat_what_ran_out_of_memory_either(
    tmp_path, streets, queue, retried, capsys
):
    grid = small_grid(tmp_path, ALONE, (f"{tmp_path}/streets", str(streets)))
    submit(grid, queue, ["grid"])
    end(queue, "job1", OUT_OF_MEMORY)
    end(queue, "job2", "error: disk full")
    capsys.readouterr()
    submit(grid, queue, ["grid"])
    assert "1 cells do not fit into memory, even one in a job" in capsys.readouterr().out
    assert cells_of(queue, "job9") == cells_of(queue, "job2")
    assert len(queue.jobs) == 9


def test_with_more_memory_the_size_is_as_it_was(tmp_path, streets, queue, retried):
    folder = (f"{tmp_path}/streets", str(streets))
    grid = small_grid(tmp_path, folder)
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job1")
    end(queue, "job1", OUT_OF_MEMORY)
    more = small_grid(tmp_path, folder, ('kind = "local"', 'kind = "local"\nmemory_gb = 64'))
    assert retried(more)[0] == "4 cells: out of memory: again, with more memory"
    assert cells_of(queue, "job3") == cells


def test_a_cell_that_was_added_goes_with_those_that_have_room_for_it(
    tmp_path, streets, queue, retried
):
    folder = (f"{tmp_path}/streets", str(streets))
    submit(small_grid(tmp_path, folder), queue, ["grid"])
    end(queue, "job1", OUT_OF_MEMORY)
    larger = small_grid(tmp_path, folder, ('"DLNWCE"', '"DLNWCE", "FL"'))
    submit(larger, queue, ["grid"])
    sizes = [len(cells_of(queue, job)) for job in list(queue.jobs)[2:]]
    assert sizes == [2, 2, 2, 2]  # six of the seed that had none, two new of the other


def test_a_users_mistake_is_told_and_not_repeated(grid, queue, retried):
    submit(grid, queue, ["grid"])
    end(queue, "job1", "error: data/x is damaged; fix it")
    lines = retried(grid)
    assert lines[0].startswith("4 cells: error: not submitted; correct the error, then `python -m ")
    first = cells_of(queue, "job1")[0]
    assert lines[1:] == [
        f"  4 cells: error: data/x is damaged; fix it; for example {first.name}",
        "nothing to submit again",
    ]
    assert len(queue.jobs) == 2


def test_a_loss_that_was_not_finite_is_tried_again_by_name_alone(grid, queue, retried):
    submit(grid, queue, ["grid"])
    first, *others = cells_of(queue, "job1")
    diverge(grid, first)
    finish(grid, others, "task1")
    end(queue, "job1")
    lines = retried(grid)
    assert lines[0].startswith("1 cell: not finite: not submitted; change their settings")
    assert lines[1].startswith(f"  {first.name}: the loss was nan at step 2 of 6; ")
    assert len(queue.jobs) == 2
    assert retried(grid, "--cell", first.name, "--dry-run")[-1] == "would submit 1 jobs"
    assert grid.run.failure(first.signature).exists()
    assert retried(grid, "--cell", first.name)[0] == "1 cell: not finite: again"
    assert cells_of(queue, "job3") == (first,)
    kept = [path.name for path in grid.run.failures.iterdir()]
    assert kept == [f"{first.signature}-retried-1.json"]
    assert words(grid, queue) == {"done": 3, "waiting": 5}
    diverge(grid, first)
    end(queue, "job3")
    retried(grid, "--cell", first.name)
    assert len(list(grid.run.failures.iterdir())) == 2


def test_a_refused_retry_leaves_the_record_of_a_failure(grid, queue, retried, monkeypatch):
    """Keep the failure record if the submission is refused, before the queue is asked or after."""
    submit(grid, queue, ["grid"])
    first, *others = cells_of(queue, "job1")
    diverge(grid, first)
    finish(grid, others, "task1")
    end(queue, "job1")
    before = sorted(path.name for path in grid.run.root.rglob("*"))
    usage = shutil.disk_usage(grid.run.root)._replace(free=0)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UserError, match="make room"):
            retried(grid, "--cell", first.name)
    assert sorted(path.name for path in grid.run.root.rglob("*")) == before

    def refuse(*_):
        raise UserError("sbatch refused the job: no such partition")

    with monkeypatch.context() as refusing:
        refusing.setattr(queue, "submit", refuse)
        with pytest.raises(UserError, match="no such partition"):
            retried(grid, "--cell", first.name)
    assert [path.name for path in grid.run.failures.iterdir()] == [f"{first.signature}.json"]


def test_named_cells_alone_are_tried_again_whatever_they_ended_with(grid, queue, retried):
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job1")
    end(queue, "job1", "ValueError: boom")
    end(queue, "job2", NODE_FAILURE)
    assert retried(grid, "--cell", cells[2].name)[0] == "1 cell: error: again"
    assert cells_of(queue, "job3") == cells[2:3]
    assert list(queue.jobs) == ["job1", "job2", "job3"]


def test_what_cannot_be_tried_again_is_refused(grid, queue):
    submit(grid, queue, ["grid"])
    first, second, *_ = cells_of(queue, "job1")
    finish(grid, [first], "task1")
    diverge(grid, second)
    queue.jobs["job1"] = "running"
    for cell, message in (
        (first, "is done"),
        (second, "has failed, but the other cells of its job still train, job job1"),
        (cells_of(queue, "job2")[0], "is waiting, job job2"),
    ):
        with pytest.raises(UserError, match=message):
            retry.main([str(grid.path), "--cell", cell.name])
    assert grid.run.failure(second.signature).exists()


def test_a_wrong_name_is_told_the_nearest(grid, queue, refusal):
    message = refusal(retry.main, grid.path, "--cell", "streets/fcn_mobilenet_v3_large/CE/2")
    assert "has no cell 'streets/fcn_mobilenet_v3_large/CE/2'; did you mean " in message
    assert "'streets/fcn_mobilenet_v3_large/CE/0'" in message


def test_what_was_cancelled_does_not_rise_by_itself(grid, queue, retried):
    submit(grid, queue, ["grid"])
    cancel(grid, queue, cells_of(queue, "job1")[:1])
    queue.why.clear()  # and Slurm has forgotten
    lines = retried(grid)
    assert lines[0].startswith("4 cells: cancelled: not submitted; `python -m pipeline.submit")
    assert len(queue.jobs) == 2
    submit(grid, queue, ["grid"])
    assert len(queue.jobs) == 3


def test_the_accounting_adds_what_squeue_has_forgotten_and_is_asked_once(grid, queue, retried):
    submit(grid, queue, ["grid"])
    end(queue, "job1", "step 3 of 6")
    end(queue, "job2", "step 3 of 6")
    queue.accounting = {"job1": "OUT_OF_MEMORY"}
    lines = retried(grid, "--dry-run")
    assert lines == [
        "4 cells: out of memory: again, at most 2 in a job",
        "4 cells: unknown: again",
        "would submit 3 jobs",
    ]
    assert queue.recalled == [["job1", "job2"]]
    survey(grid, queue)  # as status does
    assert len(queue.recalled) == 1


def test_a_backbone_that_was_interrupted_takes_its_cells_along(tmp_path, streets, queue, retried):
    """They refuse to train without it, and would be taken for a user's mistake."""
    grid = small_grid(tmp_path, PRETRAIN, (f"{tmp_path}/streets", str(streets)))
    submit(grid, queue, ["grid"])
    end(queue, "job1", NODE_FAILURE)
    for job in ("job2", "job3"):
        end(queue, job, "error: the pre-trained backbone x is missing; run grid again")
    assert retried(grid)[0] == "8 cells: node failure: again"
    assert queue.calls["job4"].module == "jobs.pretrain"
    assert queue.needs["job5"] == ["job4"]
    end(queue, "job4", OUT_OF_MEMORY)
    for job in ("job5", "job6"):
        end(queue, job, "error: the pre-trained backbone x is missing; run grid again")
    assert retried(grid)[0].startswith("8 cells: out of memory: not submitted; ")
    submit(grid, queue, ["grid"])
    assert len(queue.jobs) == 6


def test_waiting_sends_what_was_never_sent_if_it_fits(grid, queue):
    state, too_large = survey(grid, queue), grid.cells[3].signature
    assert cells_to_submit(state, "submit --wait") == list(grid.cells)
    assert cells_to_submit(replace(state, at_most={too_large: 0}), "submit --wait") == [
        cell for cell in grid.cells if cell.signature != too_large
    ]


def test_waiting_does_not_send_what_has_failed_again_and_again(grid, queue):
    queue.max_jobs = 1
    submit(grid, queue, ["grid"])
    end(queue, "job1", "error: disk full")
    assert {cell.seed for task in planned(grid, queue).bundles for cell in task.cells}
    assert {cell.seed for cell in cells_to_submit(survey(grid, queue), "submit --wait")} == {1}


@pytest.fixture
def retried_jobs_finish(grid, queue, monkeypatch):
    """Each look at the queue finds that the jobs from `job3` on have trained their cells."""
    finished = []

    def job_states(ids):
        for job in list(queue.jobs)[2:]:
            if job not in finished:
                finish(grid, cells_of(queue, job), f"task{job}")
                finished.append(job)
                end(queue, job)
        return {job: JobState(queue.jobs.get(job, "gone"), queue.why.get(job, "")) for job in ids}

    monkeypatch.setattr(queue, "job_states", job_states)
    monkeypatch.setattr(queue, "ensure_runner", lambda: None)


def waited(grid: Grid) -> int:
    """Return the exit code of `retry --wait`."""
    with pytest.raises(SystemExit) as ended:
        run(retry.main, [str(grid.path), "--wait"])
    return ended.value.code


@pytest.mark.usefixtures("retried_jobs_finish")
def test_retry_waits_where_it_is_asked_to(grid, queue):
    submit(grid, queue, ["grid"])
    end(queue, "job1", NODE_FAILURE)
    end(queue, "job2", NODE_FAILURE)
    assert waited(grid) == 0
    assert words(grid, queue) == {"done": 8}


@pytest.mark.usefixtures("retried_jobs_finish")
def test_retry_that_waits_submits_its_deferred_jobs_and_no_cell_that_was_never_submitted(
    grid, queue
):
    submit(grid, queue, ["grid"], lambda _: [c for c in grid.cells if c.loss.name == "CE"])
    end(queue, "job1", NODE_FAILURE)
    end(queue, "job2", NODE_FAILURE)
    queue.max_jobs = 1
    assert waited(grid) == 1
    assert words(grid, queue) == {"done": 4, "missing": 4}


def test_without_cells_to_retry_missing_data_are_not_refused(tmp_path, queue, retried):
    assert retried(small_grid(tmp_path)) == ["nothing to submit again"]
