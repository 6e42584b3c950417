"""The state of each cell follows from the run directory and the answers of the queue. The queue
is the one thing made up."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from data_prep.shards.manifest import read_fingerprint
from hpc.cli import UserError
from hpc.storage import checkpoint
from hpc.storage.atomic import write_json
from hpc.storage.fencing import claim
from jobs.spec.cell import Cell
from jobs.spec.task import read_task
from pipeline import status
from pipeline.config.grid_file import Grid, read_grid
from pipeline.submission.submitter import one_at_a_time, submit
from pipeline.tracking.display import time_left
from pipeline.tracking.snapshot import DEAD_AFTER_SECONDS
from pipeline.tracking.survey import STATES, CellState, survey
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import finish, small_grid
from tests.pipeline.stories import planned

REPOSITORY = Path(__file__).parents[3]
PRETRAIN = ('weights = "none"', 'weights = "pretrain"\npretrain = {batch_size = 2}')


@pytest.fixture
def grid(tmp_path, streets) -> Grid:
    """The small grid, whose data set is packed, in a run directory of its own."""
    return small_grid(tmp_path, (f"{tmp_path}/streets", str(streets)))


@pytest.fixture
def queue(tmp_path) -> FakeQueue:
    return FakeQueue(tmp_path)


@pytest.fixture
def slurm(tmp_path) -> FakeQueue:
    return FakeQueue(tmp_path, gone_is_certain=False)


def states(grid: Grid, queue: FakeQueue) -> dict[str, CellState]:
    return {state.cell.name: state for state in survey(grid, queue).cells}


def words(grid: Grid, queue: FakeQueue) -> dict[str, int]:
    """Return the number of cells in each state that occurs."""
    found = survey(grid, queue)
    return {state: found.count(state) for state in STATES if found.count(state)}


def cells_of(queue: FakeQueue, job: str) -> tuple[Cell, ...]:
    return read_task(queue.calls[job].arguments[0]).cells


def heartbeat(grid: Grid, queue: FakeQueue, job: str, step: int, stage="training", age=0.0) -> None:
    """The heartbeat of a job, as it leaves it."""
    task = read_task(queue.calls[job].arguments[0])
    record = {"stage": stage, "step": step, "total": 6, "steps_per_second": 0.5,
              "time": time.time() - age, "generation": 1}  # fmt: skip
    write_json(grid.run.progress_of(task.name), record)


def save(grid: Grid, cells: Sequence[Cell], step: int) -> None:
    """A checkpoint of cells of one bundle."""
    key = cells[0].bundle_key
    mine = claim(grid.run.generations(key), [cell.signature for cell in cells])
    entries = {cell.signature: {"weight": torch.zeros(2)} for cell in cells}
    checkpoint.save(grid.run.checkpoints(key), step, mine, entries, {})


def test_before_anything_all_cells_are_missing(grid, queue):
    assert words(grid, queue) == {"missing": 8}
    assert survey(grid, queue).steps == {}
    assert not grid.run.root.exists()  # looking changes nothing


def test_after_submitting_they_wait(grid, queue):
    jobs = submit(grid, queue, ["grid"])
    assert jobs == {"grid": ["job1", "job2"]}
    assert words(grid, queue) == {"waiting": 8}
    assert [call.module for call in queue.calls.values()] == ["jobs.train"] * 2
    assert {cell.seed for cell in cells_of(queue, "job2")} == {1}


def test_submitting_twice_is_submitting_once(grid, queue):
    first = submit(grid, queue, ["grid"])
    records = sorted(grid.run.submitted.iterdir())
    assert submit(grid, queue, ["grid"]) == first  # what one waits for is the same
    assert len(queue.jobs) == 2
    assert sorted(grid.run.submitted.iterdir()) == records


def test_the_queue_is_asked_once(grid, queue):
    submit(grid, queue, ["grid"])
    queue.questions = 0
    survey(grid, queue)
    assert queue.questions == 1


def test_a_running_job_shows_how_far_it_is(grid, queue):
    submit(grid, queue, ["grid"])
    queue.jobs["job1"] = "running"
    assert words(grid, queue) == {"running": 4, "waiting": 4}
    heartbeat(grid, queue, "job1", step=4)
    state = states(grid, queue)["streets/fcn_mobilenet_v3_large/CE/0"]
    assert (state.state, state.step, state.total, state.rate) == ("running", 4, 6, 0.5)
    assert time_left(state) == "0:00:04"


def test_a_cell_is_done_when_its_counts_are_there(grid, queue):
    submit(grid, queue, ["grid"])
    queue.jobs["job1"] = "gone"
    finish(grid, cells_of(queue, "job1"), "task1")
    assert words(grid, queue) == {"done": 4, "waiting": 4}
    assert submit(grid, queue, ["grid"]) == {"grid": ["job2"]}
    assert len(queue.jobs) == 2


def test_a_job_that_was_lost_is_interrupted_and_goes_on_from_its_checkpoint(grid, queue):
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job1")
    save(grid, cells, 3)
    heartbeat(grid, queue, "job1", step=5)
    queue.jobs["job1"] = "gone"
    assert words(grid, queue) == {"waiting": 4, "interrupted": 4}
    assert {s.step for s in states(grid, queue).values() if s.state == "interrupted"} == {3}
    assert submit(grid, queue, ["grid"]) == {"grid": ["job2", "job3"]}
    assert cells_of(queue, "job3") == cells
    assert words(grid, queue) == {"waiting": 8}


def test_cells_at_different_steps_go_on_in_jobs_of_their_own(grid, queue):
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job1")
    save(grid, cells[:3], 2)
    save(grid, cells[:1], 4)
    heartbeat(grid, queue, "job1", step=4)
    queue.jobs["job1"] = "gone"
    submit(grid, queue, ["grid"])
    assert [cells_of(queue, job) for job in ("job3", "job4", "job5")] == [
        cells[:1],
        cells[1:3],
        cells[3:],
    ]


def test_a_job_that_never_began_is_missing_again(grid, queue):
    submit(grid, queue, ["grid"])
    queue.jobs["job2"] = "gone"
    assert words(grid, queue) == {"waiting": 4, "missing": 4}


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("a warning\nerror: data/x is damaged; fix\n", "error: data/x is damaged; fix"),
        ("Traceback (most recent call last):\nValueError: boom\n", "ValueError: boom"),
    ],
)
def test_a_job_that_ended_with_an_error_says_why_and_is_tried_again(
    grid, queue, tmp_path, log, why
):
    submit(grid, queue, ["grid"])
    queue.jobs["job1"] = "gone"
    (tmp_path / "job1.err").write_text(log)
    assert words(grid, queue) == {"waiting": 4, "failed": 4}
    assert states(grid, queue)["streets/fcn_mobilenet_v3_large/CE/0"].why == why
    assert submit(grid, queue, ["grid"]) == {"grid": ["job2", "job3"]}


def test_a_job_without_memory_says_so_and_is_tried_again_in_halves(grid, queue, tmp_path):
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job1")
    queue.jobs["job1"] = "gone"
    (tmp_path / "job1.err").write_text("[rank0]: torch.OutOfMemoryError: CUDA out of memory\n")
    assert words(grid, queue) == {"waiting": 4, "failed": 4}
    state = states(grid, queue)["streets/fcn_mobilenet_v3_large/CE/0"]
    assert state.why == "[rank0]: torch.OutOfMemoryError: CUDA out of memory"
    assert state.cause == "out of memory"
    assert submit(grid, queue, ["grid"]) == {"grid": ["job2", "job3", "job4"]}
    assert [cells_of(queue, job) for job in ("job3", "job4")] == [cells[:2], cells[2:]]


def test_words_of_its_log_are_no_error(grid, queue, tmp_path):
    submit(grid, queue, ["grid"])
    queue.jobs["job1"] = "gone"
    heartbeat(grid, queue, "job1", step=1)
    (tmp_path / "job1.err").write_text("task1 (generation 1): stopped by SIGUSR2 after step 1\n")
    assert words(grid, queue) == {"waiting": 4, "interrupted": 4}


def test_a_cell_whose_loss_was_not_finite_has_failed_for_good(grid, queue):
    submit(grid, queue, ["grid"])
    cells = cells_of(queue, "job1")
    record = {"cell": cells[0].name, "step": 2, "reason": "the loss was nan at step 2 of 6"}
    write_json(grid.run.failure(cells[0].signature), record)
    finish(grid, cells[1:], "task1")
    queue.jobs["job1"] = "gone"
    assert words(grid, queue) == {"done": 3, "waiting": 4, "failed": 1}
    why = states(grid, queue)[cells[0].name].why
    again = f"python -m pipeline.retry {grid.command_arguments} --cell {cells[0].name}"
    assert why == (
        f"the loss was nan at step 2 of 6; change its settings, or try again with `{again}`"
    )
    assert submit(grid, queue, ["grid"]) == {"grid": ["job2"]}  # it would fail again
    grid.run.failure(cells[0].signature).unlink()  # as `retry --cell` does
    submit(grid, queue, ["grid"])
    assert cells_of(queue, "job3") == cells[:1]


def test_the_hint_for_a_cell_that_was_not_finite_quotes_its_name(tmp_path, queue):
    grid = small_grid(tmp_path, ("[dataset.streets]", '[dataset."wet streets"]'))
    cell = grid.cells[0]
    write_json(grid.run.failure(cell.signature), {"cell": cell.name, "reason": "nan"})
    assert states(grid, queue)[cell.name].why.endswith(f" --cell '{cell.name}'`")


def damaged_index(path: Path) -> Path:
    index = path.with_suffix(".json")
    index.write_text(index.read_text().replace('"bytes": ', '"bytes": 1'))
    return index


def cut_file(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1])
    return path


def lost_file(path: Path) -> Path:
    path.unlink()
    return path


@pytest.mark.parametrize("damage", [damaged_index, cut_file, lost_file])
def test_damaged_counts_are_named_and_their_cells_are_missing_again(grid, queue, damage):
    seed0, seed1 = ([cell for cell in grid.cells if cell.seed == seed] for seed in (0, 1))
    finish(grid, seed1, "task1")
    named = damage(finish(grid, seed0, "task0"))
    found = survey(grid, queue)
    assert (found.count("done"), found.count("missing")) == (4, 4)
    (problem,) = found.problems
    assert problem.startswith(str(named)) and "\n" not in problem
    submit(grid, queue, ["grid"])
    assert cells_of(queue, "job1") == tuple(seed0)
    finish(grid, seed0, "task0", generation=2)  # what they are trained again to
    assert words(grid, queue) == {"done": 8}


def test_on_slurm_a_job_is_dead_when_it_is_gone_and_its_heart_has_stopped(grid, slurm):
    """A node that was cut off may still run what Slurm has given up."""
    submit(grid, slurm, ["grid"])
    slurm.jobs["job1"] = "gone"
    heartbeat(grid, slurm, "job1", step=2, age=DEAD_AFTER_SECONDS / 2)
    assert words(grid, slurm) == {"running": 4, "waiting": 4}
    assert submit(grid, slurm, ["grid"]) == {"grid": ["job1", "job2"]}
    heartbeat(grid, slurm, "job1", step=2, age=DEAD_AFTER_SECONDS + 1)
    assert words(grid, slurm) == {"waiting": 4, "interrupted": 4}


@pytest.mark.parametrize("stage", ["stopped", "done"])
def test_a_heart_that_said_goodbye_has_stopped(grid, slurm, stage):
    submit(grid, slurm, ["grid"])
    slurm.jobs["job1"] = "gone"
    heartbeat(grid, slurm, "job1", step=2, stage=stage)
    assert words(grid, slurm) == {"waiting": 4, "interrupted": 4}


def test_a_stopped_heart_in_the_queue_is_no_death(grid, slurm):
    """A step may take long, and a requeued job waits."""
    submit(grid, slurm, ["grid"])
    slurm.jobs["job1"] = "running"
    for job in ("job1", "job2"):
        heartbeat(grid, slurm, job, step=2, age=10 * DEAD_AFTER_SECONDS)
    assert words(grid, slurm) == {"running": 4, "waiting": 4}


class DyingQueue(FakeQueue):
    """The submission dies before the queue's answer is written down; the job is queued or not."""

    def submit(self, *arguments, **options) -> list[str]:
        super().submit(*arguments, **options)
        raise KeyboardInterrupt


def test_a_submission_that_was_interrupted_loses_nothing(grid, queue, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        submit(grid, DyingQueue(tmp_path), ["grid"])
    assert len(list(grid.run.submitted.iterdir())) == 1  # written before the queue was asked
    assert words(grid, queue) == {"missing": 8}
    assert submit(grid, queue, ["grid"]) == {"grid": ["job1", "job2"]}
    assert words(grid, queue) == {"waiting": 8}


def test_a_job_that_lives_without_our_knowing_its_id_is_not_doubled(grid, slurm, tmp_path):
    dying = DyingQueue(tmp_path, gone_is_certain=False)
    with pytest.raises(KeyboardInterrupt):
        submit(grid, dying, ["grid"])
    heartbeat(grid, dying, "job1", step=1)
    found = survey(grid, slurm)
    assert (found.count("running"), found.count("missing")) == (4, 4)
    assert found.active_jobs == frozenset()  # there is no id to wait for
    submit(grid, slurm, ["grid"])
    assert [cell.seed for cell in cells_of(slurm, "job1")] == [1] * 4
    assert slurm.after["job1"] == []


def test_if_the_queue_refuses_nothing_is_taken_for_submitted(grid, queue, monkeypatch):
    def refuse(*_, **__):
        raise UserError("sbatch refused the job: no such partition")

    with monkeypatch.context() as context:
        context.setattr(queue, "submit", refuse)
        with pytest.raises(UserError, match="no such partition"):
            submit(grid, queue, ["grid"])
    assert words(grid, queue) == {"missing": 8}


@pytest.fixture
def pretrained(tmp_path, streets) -> Grid:
    return small_grid(tmp_path, PRETRAIN, (f"{tmp_path}/streets", str(streets)))


def test_cells_wait_for_the_backbone_they_share(pretrained, queue):
    submit(pretrained, queue, ["grid"])
    assert queue.calls["job1"].module == "jobs.pretrain"
    assert queue.needs == {"job1": [], "job2": ["job1"], "job3": ["job1"]}
    found = survey(pretrained, queue)
    assert dict(found.pretraining) == {pretrained.cells[0].backbone_key: "job1"}
    assert found.count("waiting") == 8


def test_a_backbone_that_is_being_trained_is_not_trained_twice(pretrained, queue):
    submit(pretrained, queue, ["grid"])
    queue.jobs |= {"job1": "running", "job2": "gone"}
    submit(pretrained, queue, ["grid"])
    assert queue.calls["job4"].module == "jobs.train"
    assert queue.needs["job4"] == ["job1"]
    assert "job5" not in queue.jobs


def test_a_backbone_that_is_trained_is_used(pretrained, queue):
    path = pretrained.run.backbone(pretrained.cells[0].backbone_key)
    packed = read_fingerprint(pretrained.datasets["streets"].shards)
    write_json(path.with_suffix(".json"), {"sha256": "0", "manifest": packed})
    submit(pretrained, queue, ["grid"])
    assert [call.module for call in queue.calls.values()] == ["jobs.train"] * 2
    assert queue.needs == {"job1": [], "job2": []}


def test_a_pre_training_that_was_lost_is_submitted_again(pretrained, queue):
    submit(pretrained, queue, ["grid"])
    queue.jobs |= dict.fromkeys(["job1", "job2", "job3"], "gone")
    submit(pretrained, queue, ["grid"])
    assert queue.calls["job4"].module == "jobs.pretrain"
    assert queue.needs["job5"] == queue.needs["job6"] == ["job4"]


def test_all_stages_follow_one_another(grid, queue):
    jobs = submit(grid, queue, ["prep", "grid", "reduce", "report"])
    modules = {stage: [queue.calls[job].module for job in ids] for stage, ids in jobs.items()}
    assert modules == {
        "prep": ["data_prep.pack"],
        "grid": ["jobs.train", "jobs.train"],
        "reduce": ["pipeline.reduce"],
        "report": ["pipeline.report"],
    }
    (prep,), training, (reducing,), (report,) = jobs.values()
    assert [queue.needs[job] for job in training] == [[prep], [prep]]
    assert set(training) <= set(queue.after[reducing])
    assert queue.needs[report] == [reducing]
    kept = grid.run.root / "grid.toml"
    assert queue.calls[reducing].arguments == (str(kept),)
    assert kept.read_bytes() == grid.path.read_bytes()
    assert read_grid(kept).cells == grid.cells


def test_planning_records_which_code_it_was(grid, queue):
    task = planned(grid, queue).bundles[0]
    if (REPOSITORY / ".git").exists():
        assert len(task.source["commit"]) == 40
        assert "diff" in task.source


def test_status_shows_cells_with_their_states(grid, capsys):
    finish(grid, [cell for cell in grid.cells if cell.seed == 0], "task0")
    assert status.main([str(grid.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "small: 8 cells: 4 done, 4 missing"
    assert sum("done" in line for line in lines[:-1]) == 4
    status.main([str(grid.path), "--state", "missing"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("missing" in line for line in lines[:-1]) == 4
    assert not any("done" in line for line in lines[:-1])


TWO_AT_ONCE = """
import sys, time
from pathlib import Path
from pipeline.config.grid_file import read_grid
from pipeline.submission.submitter import submit
from hpc.scheduler.base import JobState
from tests.pipeline.fake_queue import FakeQueue
class SlowQueue(FakeQueue):
    def submit(self, calls, *arguments, **options):
        time.sleep(0.3)
        return super().submit(calls, *arguments, **options)
    def job_states(self, ids):
        return dict.fromkeys(ids, JobState("waiting"))
queue = SlowQueue(Path("."))
grid = read_grid(sys.argv[1])
print("ready", flush=True)
input()
submit(grid, queue, ["grid"])
print("submitted", len(queue.jobs))
"""


def test_of_two_submissions_at_once_the_second_sees_what_the_first_did(grid):
    line = [sys.executable, "-c", TWO_AT_ONCE, str(grid.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    users = [subprocess.Popen(line, cwd=REPOSITORY, **pipes) for _ in range(2)]
    for user in users:
        assert user.stdout.readline() == "ready\n"
    for user in users:
        user.stdin.write("go\n")
        user.stdin.flush()
    said = sorted(user.communicate(timeout=60)[0].splitlines()[-1] for user in users)
    assert said == ["submitted 0", "submitted 2"]
    assert [user.returncode for user in users] == [0, 0]


def test_another_run_is_not_waited_for(tmp_path):
    with one_at_a_time(tmp_path / "one"), one_at_a_time(tmp_path / "other"):
        pass
    with one_at_a_time(tmp_path / "one"):  # and the first may come again
        pass


def test_a_mistake_while_submitting_is_told_as_what_it_is(tmp_path):
    with pytest.raises(PermissionError, match="sbatch"), one_at_a_time(tmp_path / "run"):
        raise PermissionError("sbatch")


def test_only_the_cells_of_the_grid_as_it_is_now_are_looked_at(grid, queue, tmp_path, streets):
    finish(grid, grid.cells, "task0")
    changes = (('"DLNWCE"', '"FL"'), (f"{tmp_path}/streets", str(streets)))
    other = small_grid(tmp_path, *changes)
    done = [s.cell.loss.name for s in survey(other, queue).cells if s.state == "done"]
    assert done == ["CE"] * 4
    submit(other, queue, ["grid"])
    assert {cell.loss.name for cell in cells_of(queue, "job1")} == {"FL"}
