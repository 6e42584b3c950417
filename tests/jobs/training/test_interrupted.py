"""Same cell, same bits: whatever interrupts a job, the cells end as if nothing had happened."""

from __future__ import annotations

import random
import secrets
import shutil
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from hpc.storage import checkpoint
from hpc.storage.atomic import read_json
from jobs import train
from jobs.models.build import build_backbone, build_head
from jobs.spec.counts_file import read_index
from jobs.spec.task import read_task
from jobs.training import cell_trainer
from jobs.training.cell_trainer import CellTrainer
from pipeline import reduce
from pipeline.config.grid_file import Grid
from pipeline.scores.results_file import read_results
from pipeline.submission.submitter import submit
from tests.jobs.cells import CLASS_WEIGHTS, MODEL, a_cell, a_share
from tests.jobs.job_processes import Job, jobs, lives, until
from tests.jobs.small_runs import (
    STEPS,
    assert_all_same,
    assert_same,
    grid_of,
    half_written,
    is_done,
    results,
    steps_saved,
    task_of,
)
from tests.pipeline.fake_queue import FakeQueue

ATTEMPTS = 20  # to hit a random moment in the phase that is meant


class Seconds(NamedTuple):
    """The time from the start of a job to its first checkpoint, and from there to its end."""

    before: float
    after: float


@pytest.fixture
def start(tmp_path):
    with jobs(tmp_path / "logs") as start:
        yield start


@pytest.fixture(scope="module")
def seconds(streets, tmp_path_factory) -> Seconds:
    folder = tmp_path_factory.mktemp("timed")
    grid = grid_of(folder, streets.folder, "CE", "DLNWCE")
    with jobs(folder / "logs") as start:
        start(task_of(grid)).kill()  # what starts all processes takes its time once
        started = time.monotonic()
        job = start(task_of(grid))
        until(lambda: steps_saved(grid), "a first checkpoint")
        saved = time.monotonic()
        assert job.end() == [0]
    return Seconds(saved - started, time.monotonic() - saved)


@pytest.fixture
def grid(streets, tmp_path) -> Grid:
    return grid_of(tmp_path / "run-of-two", streets.folder, "CE", "DLNWCE", workers=2)


def kill_at_random(
    start: Callable[..., Job], grid: Grid, ready: Callable[[], object], seconds: float,
    hit: Callable[[], object],
) -> Job:  # fmt: skip
    """Start the grid's job and kill it up to `seconds` after it is `ready`. If that missed the
    phase that is meant, begin again from the files that were there before."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    before = grid.run.root.with_name("before")
    for _ in range(ATTEMPTS):
        task = task_of(grid)
        shutil.copytree(grid.run.root, before)
        job = start(task)
        until(lambda: ready() or not job.runs, "ready to be killed")  # noqa: B023
        seconds = draw.uniform(0, seconds)  # after a miss, earlier
        time.sleep(seconds)
        job.kill()
        if hit():
            shutil.rmtree(before)
            return job
        shutil.rmtree(grid.run.root)
        before.rename(grid.run.root)
    raise AssertionError(f"not hit in {ATTEMPTS} attempts; the last log:\n{job.log}")


def finish(start: Callable[..., Job], grid: Grid) -> str:
    """Run the grid's job to its end; its log."""
    job = start(task_of(grid))
    assert job.end() == [0], job.log
    return job.log


@pytest.mark.parametrize("time_of", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_killed_at_random_before_and_after_its_first_checkpoint(
    grid, start, seconds, undisturbed, time_of
):
    kill_at_random(
        start, grid, lambda: True, seconds.before,
        lambda: not steps_saved(grid) and not is_done(grid),  # which has none either
    )  # fmt: skip
    second = kill_at_random(
        start, grid, lambda: steps_saved(grid), seconds.after,
        lambda: steps_saved(grid) and not is_done(grid),
    )  # fmt: skip
    assert "there is no checkpoint\n" in second.log and "starting at step 0\n" in second.log
    saved = steps_saved(grid)[-1]
    assert 0 < saved <= STEPS
    assert f"resuming at step {saved}\n" in finish(start, grid)
    assert_all_same(results(grid.run), undisturbed)
    assert reduce.main([str(grid.path)]) == 0
    for cell in read_results(grid.run.results).datasets[0].cells:
        assert cell["notes"] == []  # an interruption alone does not mark a cell


@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", "later"])
def test_killed_while_it_writes_a_checkpoint(grid, start, undisturbed, which):
    later = which == "later"
    kill_at_random(
        start, grid,
        ready=lambda: half_written(grid) and bool(steps_saved(grid)) == later,
        seconds=0.005,
        hit=lambda: half_written(grid) and bool(steps_saved(grid)) == later,
    )  # fmt: skip
    saved = max(steps_saved(grid), default=0)
    expected = f"resuming at step {saved}" if later else "starting at step 0"
    assert expected in finish(start, grid)
    assert_all_same(results(grid.run), undisturbed)


def test_the_loaders_of_a_killed_job_end(grid, start):
    job = start(task_of(grid))
    until(lambda: "starting at step 0" in job.log, "training")
    until(lambda: steps_saved(grid), "a checkpoint")
    job.kill()
    assert len(job.loaders) == 2
    until(lambda: not any(map(lives, job.loaders)), "all loaders ended", seconds=20)


@pytest.mark.slow
def test_two_losses_are_added_to_an_interrupted_grid_and_one_is_removed(
    streets, tmp_path, start, undisturbed
):
    folder, queue = tmp_path / "grid", FakeQueue(tmp_path)
    first = grid_of(folder, streets.folder, "CE", "WCE", "DLNWCE")
    (job_id,) = submit(first, queue, ["grid"])["grid"]
    job = start(queue.calls[job_id])
    until(lambda: steps_saved(first), "a checkpoint")
    job.send(signal.SIGTERM)
    assert job.end() == [0]
    saved = steps_saved(first)[-1]
    assert 0 < saved < STEPS
    queue.jobs.clear()  # the queue has forgotten the job

    second = grid_of(folder, streets.folder, "WDL", "DLNWCE", "CE", "FL")
    logs = {}
    for job_id in submit(second, queue, ["grid"])["grid"]:
        job = start(queue.calls[job_id])
        assert job.end() == [0], job.log
        task = read_task(queue.calls[job_id].arguments[0])
        logs[frozenset(cell.loss.name for cell in task.cells)] = job.log
    assert f"resuming at step {saved}\n" in logs.pop(frozenset({"CE", "DLNWCE"}))
    assert "starting at step 0\n" in logs.pop(frozenset({"WDL", "FL"}))
    assert not logs

    alone = grid_of(tmp_path / "alone", streets.folder, "WDL", "FL")
    assert train.main([str(task_of(alone))]) == 0
    assert_all_same(results(second.run), {**undisturbed, **results(alone.run)})


@pytest.mark.slow
def test_resuming_on_more_threads_more_ranks_and_fewer_ranks_is_allowed_and_marked(
    streets, tmp_path, start
):
    ways = [(1, 1), (1, 2), (2, 1), (1, 1)]  # ranks and threads
    saved = 0
    for n, (ranks, threads) in enumerate(ways, 1):
        grid = grid_of(tmp_path / "grid", streets.folder, "CE", threads=threads, epochs=6)
        job = start(task_of(grid), ranks)
        until(lambda: not job.runs or max(steps_saved(grid), default=0) > saved, "a step")  # noqa: B023
        assert not is_done(grid)
        if n < len(ways):
            job.send(signal.SIGTERM)
        assert job.end() == [0] * ranks, job.logs
        assert not saved or f"resuming at step {saved}\n" in job.log
        saved = max(steps_saved(grid), default=0)

    (path,) = grid.run.counts.glob("*.json")
    first, *others = read_index(path).record["provenance"]
    changed = [{k for k in first if first[k] != other[k]} for other in others]
    assert changed == [{"threads"}, {"world_size"}]
    kinds = [(kind["world_size"], kind["threads"]) for kind in (first, *others)]
    assert kinds == list(dict.fromkeys(ways))
    assert reduce.main([str(grid.path)]) == 0
    (cell,) = read_results(grid.run.results).datasets[0].cells
    assert cell["notes"] == ["mixed provenance: 3 kinds"]


@pytest.mark.slow
def test_running_statistics_of_a_frozen_backbone_go_on_where_they_were(
    streets, tmp_path, start, undisturbed
):
    settings = {"backbone_batchnorm": "train"}
    whole = grid_of(tmp_path / "whole", streets.folder, "CE", **settings)
    finish(start, whole)
    grid = grid_of(tmp_path / "killed", streets.folder, "CE", **settings)
    kill_at_random(
        start, grid, lambda: steps_saved(grid), 0.3, lambda: steps_saved(grid) and not is_done(grid)
    )
    assert "resuming at step" in finish(start, grid)
    assert_all_same(results(grid.run), results(whole.run))
    ((name, moved),) = results(whole.run).items()
    with pytest.raises(AssertionError):  # they do move, and it is seen in the result
        assert_same(undisturbed[name], moved)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_checkpoint_holds_what_a_step_changes_and_nothing_else(streets, tmp_path, start, mode):
    """Position is one integer: no generator's state, no order, no schedule."""
    grid = grid_of(tmp_path / "grid", streets.folder, "CE", "DLNWCE", backbone_batchnorm=mode)
    kill_at_random(start, grid, lambda: steps_saved(grid), 0.0, lambda: steps_saved(grid))
    entries = {cell.signature for cell in grid.cells}
    moving = dict(build_backbone("mobilenet_v3_large", 0, 0.1).named_buffers())
    for one in checkpoint.find(grid.run.checkpoints(grid.cells[0].bundle_key))[0]:
        index = read_json(one.path / "index.json")
        assert {*index} == {"folder", "step", "generation", "entries", "inputs", "provenance"}
        assert index["entries"].keys() == entries
        files = {"index.json", *(f"{entry}.pt" for entry in entries)}
        assert {path.name for path in one.path.iterdir()} == files
        for entry in entries:
            state = torch.load(one.path / f"{entry}.pt", weights_only=True)
            assert state.keys() == {"network", "momentum", "scaler", "backbone"}
            head = build_head(MODEL, 8, 0, 0.1)
            assert state["network"].keys() == head.state_dict().keys()
            parameters = list(head.parameters())
            assert [*state["momentum"]] == list(range(len(parameters)))
            for momentum, parameter in zip(state["momentum"].values(), parameters, strict=True):
                assert momentum.keys() == {"momentum_buffer"}
                assert momentum["momentum_buffer"].shape == parameter.shape
            assert state["scaler"] == {}  # no mixed precision on a CPU
            assert state["backbone"].keys() == (moving.keys() if mode == "train" else set())


def test_without_mixed_precision_and_then_with_it(alone, monkeypatch):
    """A job can move from a CPU to a GPU and back."""
    first = CellTrainer(a_cell(), 3, CLASS_WEIGHTS, alone)
    first.step(*a_share(0), 0, 4)
    monkeypatch.setattr(cell_trainer, "is_mixed", lambda *_: True)
    second = CellTrainer(a_cell(), 3, CLASS_WEIGHTS, alone)
    second.load(first.state())
    assert second.state()["scaler"]["scale"] > 1  # its own, and not that of the first
    first.load(second.state())
    assert first.state()["scaler"] == {}


def test_what_rank_0_cannot_write_ends_all_ranks_with_one_line(streets, tmp_path, start):
    grid = grid_of(tmp_path / "grid", streets.folder, "CE")
    task = task_of(grid)
    (grid.run.root / "checkpoints").write_text("a file in the way")
    job = start(task, 2)
    assert job.end() == [2, 2], job.logs
    for log in job.logs:
        (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: cannot write {grid.run.root}/checkpoints/")
        assert line.endswith("; free space or fix permissions, run again")
        assert "Traceback" not in log
