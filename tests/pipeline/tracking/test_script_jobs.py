"""Status finds the jobs that the user starts from batch scripts. These tests also see what is
written and submitted after it. The queue is made up; nothing is trained."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from hpc.storage.atomic import read_json, write_json
from pipeline.cancel import cancel
from pipeline.config.grid_file import Grid
from pipeline.logs import jobs_of
from pipeline.submission import script_folder
from pipeline.submission.script_folder import write_scripts
from pipeline.submission.submitter import submit
from pipeline.tracking.survey import survey
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import finish, small_grid
from tests.pipeline.stories import planned
from tests.pipeline.submission.slurm_scripts import Site
from tests.pipeline.tracking.test_survey import PRETRAIN, grid, save, states, words  # noqa: F401

# ruff: noqa: F811 (fixtures of another file)


@pytest.fixture
def cluster(tmp_path) -> FakeQueue:
    """Slurm, where a job that is gone may still have a process."""
    return FakeQueue(tmp_path, gone_is_certain=False)


def write(grid: Grid, queue: FakeQueue, folder: str = "scripts", *stages: str) -> Path:
    path = grid.path.parent / folder
    write_scripts(grid, queue, stages or ["grid"], path)
    return path


def token(grid: Grid) -> str:
    return sorted(grid.run.submitted.glob("*.json"))[-1].stem


def note(grid: Grid, job: int, name: str = "train", record: str = "") -> None:
    """Leave the notes of submit.sh and of an element as it starts."""
    (grid.run.submitted / f"{record or token(grid)}-{name}.{job}").touch()


def task_name(grid: Grid, element: int) -> str:
    """Of the last record."""
    return read_json(grid.run.submitted / f"{token(grid)}.json")["tasks"][element]["task"]


def heartbeat(grid: Grid, task: str, stage: str = "training", age: float = 0.0) -> None:
    now = time.time() - age
    record = {"stage": stage, "step": 4, "total": 6, "steps_per_second": 0.5, "time": now}
    write_json(grid.run.progress_of(task), record)


def test_what_was_only_written_is_missing(grid, cluster):
    folder = write(grid, cluster)
    assert sorted(path.name for path in folder.iterdir()) == ["submit.sh", "train.sbatch"]
    found = states(grid, cluster)
    assert {(s.state, s.why) for s in found.values()} == {("missing", "its script has not started")}
    assert not cluster.jobs  # nothing was submitted


def test_jobs_that_wait_or_run_are_seen_by_the_notes(grid, cluster):
    write(grid, cluster)
    note(grid, 7)
    cluster.jobs = {"7_0": "running", "7_1": "waiting"}
    assert words(grid, cluster) == {"running": 4, "waiting": 4}
    assert survey(grid, cluster).active_jobs == {"7_0", "7_1"}
    assert submit(grid, cluster, ["grid"]) == {"grid": ["7_0", "7_1"]}  # to be waited for


@pytest.mark.parametrize("gone_is_certain", [False, True], ids=["Slurm", "no Slurm here"])
def test_a_heart_that_beats_is_running_whatever_the_queue_knows(grid, tmp_path, gone_is_certain):
    queue = FakeQueue(tmp_path, gone_is_certain)
    write(grid, queue)
    note(grid, 7)
    task = task_name(grid, 0)
    heartbeat(grid, task)
    assert words(grid, queue) == {"running": 4, "missing": 4}
    jobs = submit(grid, queue, ["grid"])["grid"]
    assert len(queue.calls) == 1  # one job, for the other task
    assert len(jobs) == 2
    heartbeat(grid, task, age=60)
    assert words(grid, queue) == {"interrupted": 4, "waiting": 4}


def test_an_interrupted_job_is_written_again_and_goes_on_from_its_checkpoint(grid, cluster):
    write(grid, cluster)
    note(grid, 7)
    (job, other) = planned(grid, cluster).bundles
    save(grid, job.cells, 3)
    heartbeat(grid, task_name(grid, 0), "stopped")
    finish(grid, other.cells, "other")
    assert words(grid, cluster) == {"done": 4, "interrupted": 4}
    folder = write(grid, cluster)
    (task,) = read_json(grid.run.submitted / f"{token(grid)}.json")["tasks"]
    assert task["cells"] == [cell.signature for cell in job.cells]
    assert (
        f"\n    {task['task']}  # 4 cells of streets, seed 0\n)"
        in (folder / "train.sbatch").read_text()
    )


def test_a_job_that_failed_says_why(grid, cluster, tmp_path):
    write(grid, cluster)
    note(grid, 7)
    (tmp_path / "7_1.err").write_text("error: no manifest\n")
    found = [state for state in states(grid, cluster).values() if state.state == "failed"]
    assert len(found) == 4
    assert {state.why for state in found} == {"error: no manifest"}


def test_an_array_of_some_elements_does_not_hide_the_one_before(grid, cluster):
    """`sbatch --array=1 train.sbatch`, while element 0 of the first array runs."""
    write(grid, cluster)
    note(grid, 9)
    note(grid, 10)
    cluster.jobs = {"9_0": "running", "10_1": "waiting"}
    assert words(grid, cluster) == {"running": 4, "waiting": 4}


def test_a_script_older_than_the_last_is_seen_to_run(grid, cluster):
    write(grid, cluster)
    first = token(grid)
    save(grid, planned(grid, cluster).bundles[0].cells, 3)
    write(grid, cluster)  # other tasks now: they start at another step
    note(grid, 7, record=first)
    cluster.jobs = {"7_0": "running", "7_1": "running"}
    assert words(grid, cluster) == {"running": 8}


def test_pre_training_by_a_script_is_waited_for(tmp_path, streets, cluster, capsys):
    grid = small_grid(tmp_path, (f"{tmp_path}/streets", str(streets)), PRETRAIN)
    folder = write(grid, cluster)
    assert (folder / "pretrain.sbatch").exists()
    note(grid, 7, "pretrain")
    cluster.jobs = {"7_0": "running"}
    write(grid, cluster, "more")
    assert "2 jobs are left out until 7_0 has trained their backbone\n" in capsys.readouterr().out
    assert not (tmp_path / "more").exists()
    jobs = submit(grid, cluster, ["grid"])["grid"]
    assert {cluster.calls[job].module for job in jobs if job != "7_0"} == {"jobs.train"}
    assert all(cluster.needs[job] == ["7_0"] for job in jobs if job != "7_0")


def test_pre_training_by_a_script_that_failed_is_why_its_cells_are_not_done(
    tmp_path, streets, cluster
):
    grid = small_grid(tmp_path, (f"{tmp_path}/streets", str(streets)), PRETRAIN)
    write(grid, cluster)
    note(grid, 7, "pretrain")
    note(grid, 8)
    (tmp_path / "7_0.err").write_text("error: the loss was nan\n")
    cluster.why = {"7_0": "FAILED", "8_0": "CANCELLED", "8_1": "CANCELLED"}
    found = survey(grid, cluster)
    said = "pre-training failed: error: the loss was nan"
    assert {(cell.state, cell.why) for cell in found.cells} == {("failed", said)}
    assert [str(failure) for failure in found.failed] == [said]


def test_a_record_whose_scripts_were_never_written_is_no_submission(grid, cluster, monkeypatch):
    def crash(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script_folder, "write_folder", crash)
    with pytest.raises(KeyboardInterrupt):
        write(grid, cluster)
    assert words(grid, cluster) == {"missing": 8}
    assert len(submit(grid, cluster, ["grid"])["grid"]) == 2


def test_scripts_of_before_that_are_not_needed_any_more_are_removed(grid, cluster):
    folder = write(grid, cluster, "scripts", "prep", "grid", "reduce", "report")
    assert len(list(folder.iterdir())) == 5
    (folder / ".tmp-host-0123").touch()  # of a writer that was killed
    write(grid, cluster, "scripts", "reduce")
    assert {path.name for path in folder.iterdir()} - {".tmp-host-0123"} == {
        "submit.sh", "reduce.sbatch",
    }  # fmt: skip


def test_a_refusal_by_sbatch_ends_the_sending(grid, cluster, tmp_path):
    folder, site = (
        write(grid, cluster, "scripts", "prep", "grid", "reduce"),
        Site(tmp_path / "site"),
    )
    (site.folder / "refuse").touch()
    done = subprocess.run(
        [str(folder / "submit.sh")], env={"PATH": site.path}, capture_output=True, text=True
    )
    assert done.returncode and done.stderr == "sbatch: error: invalid partition\n"
    assert not [*grid.run.submitted.glob("*-train.*")]


def test_their_jobs_are_cancelled_and_their_logs_shown_like_others(grid, cluster, tmp_path):
    write(grid, cluster)
    note(grid, 7)
    note(grid, 9)  # sent again
    cluster.jobs = {"7_0": "gone", "7_1": "gone", "9_0": "running", "9_1": "waiting"}
    cell = next(cell for cell in grid.cells if states(grid, cluster)[cell.name].job == "9_1")
    assert jobs_of(grid, cluster, cell.name) == (cell.name, ["9_1", "7_1"])
    ended = []
    cluster.cancel = ended.extend
    assert cancel(grid, cluster)[0] == "cancelled 2 jobs"
    assert sorted(ended) == ["9_0", "9_1"]
    cluster.jobs = {}
    assert {state.cause for state in states(grid, cluster).values()} == {"cancelled"}
