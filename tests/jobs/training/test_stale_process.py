"""A process that was cut off and wakes up after its successor started publishes nothing, deletes
nothing, and ends by itself with one line."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.shards.manifest import Manifest
from hpc.distributed.launcher import RankEnv
from hpc.distributed.preemption import StopRequest
from hpc.scheduler import slurm_cli
from hpc.scheduler.base import QueueUnreachable
from hpc.scheduler.job import ModuleCall
from hpc.storage.atomic import file_sha256, read_json
from hpc.storage.fencing import Superseded
from jobs import pretrain, train
from jobs.metrics.counts import Counts
from jobs.pretrain import pretraining_cell, publish_backbone
from jobs.spec import counts_file
from jobs.spec.task import Task, read_task
from jobs.training.backbone import load_backbone
from jobs.training.job_run import Action, JobRun
from pipeline.config.grid_file import Grid
from tests.jobs.job_processes import Job, jobs, tree, until
from tests.jobs.small_runs import (
    assert_all_same,
    grid_of,
    half_written,
    is_done,
    results,
    steps_saved,
    task_of,
)

SOON = 15.0  # seconds; a heartbeat is every 2 s, and the machine may be busy
ATTEMPTS = 20


@pytest.fixture
def start(tmp_path):
    with jobs(tmp_path / "logs") as start:
        yield start


@pytest.fixture
def grid(streets, tmp_path) -> Grid:
    return grid_of(tmp_path / "stale", streets.folder, "CE", "DLNWCE", workers=2)


def stopped(
    start: Callable[..., Job], grid: Grid, when: Callable[[Grid], object], ranks: int = 1,
    task: Callable[[Grid], Path | ModuleCall] = task_of,
) -> Job:  # fmt: skip
    """A job that stands still where `when` holds; tried again until one does."""
    for _ in range(ATTEMPTS):
        shutil.rmtree(grid.run.root, ignore_errors=True)
        job = start(task(grid), ranks)
        until(lambda: when(grid) or not job.runs, "the moment to stop")  # noqa: B023
        job.stop()
        if job.runs and when(grid):
            return job
        job.kill()
    raise AssertionError(f"not hit in {ATTEMPTS} attempts")


def wake_up(stale: Job, grid: Grid, ranks: int = 1) -> None:
    """The stale job goes on: it must leave all as it is but for what it was writing, and end."""
    mine = half_written(grid) + list(grid.run.root.glob("*/.tmp-*"))
    before = tree(grid.run.root)
    stale.send(signal.SIGCONT)
    assert stale.end(SOON) == [2] * ranks, stale.logs
    after = tree(grid.run.root)
    gone = {path for path in before if any((grid.run.root / path).is_relative_to(m) for m in mine)}
    assert after == {path: what for path, what in before.items() if path not in gone}
    for log in stale.logs:
        (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
        assert "a later start has taken over: generation 1 in" in line
        assert "Traceback" not in log


def in_the_middle(grid: Grid) -> bool:
    return bool(steps_saved(grid)) and not half_written(grid) and not is_done(grid)


def in_a_save(grid: Grid) -> bool:
    return bool(steps_saved(grid)) and bool(half_written(grid))


def in_publishing(grid: Grid) -> bool:
    return any((grid.run.root / "heads").glob("*.pt")) and not any(grid.run.counts.glob("*"))


@pytest.mark.parametrize(
    "when",
    [in_the_middle, *(pytest.param(when, marks=pytest.mark.slow)
                      for when in (in_a_save, in_publishing))],
)  # fmt: skip
def test_waking_up_after_the_successors_end(grid, start, undisturbed, when):
    stale = stopped(start, grid, when)
    successor = start(task_of(grid))
    assert successor.end() == [0], successor.log
    assert "resuming at step" in successor.log
    wake_up(stale, grid)
    assert_all_same(results(grid.run), undisturbed)


@pytest.mark.slow
def test_two_ranks_that_wake_up_after_their_successors_end(grid, start, streets, tmp_path):
    stale = stopped(start, grid, in_the_middle, 2)
    successor = start(task_of(grid), 2)
    assert successor.end() == [0, 0], successor.logs
    assert "resuming at step" in successor.log
    wake_up(stale, grid, 2)
    through = grid_of(tmp_path / "through", streets.folder, "CE", "DLNWCE")
    assert start(task_of(through), 2).end() == [0, 0]
    assert_all_same(results(grid.run), results(through.run))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_waking_up_while_the_successor_trains(streets, tmp_path, start, ranks):
    """Long before its next checkpoint would be due."""
    grid = grid_of(tmp_path / "long", streets.folder, "CE", epochs=2000, checkpoint_minutes=60.0)

    def trains(generation: int) -> bool:
        beat = heartbeat(grid)
        return beat.get("generation") == generation and beat["step"] > 0

    stale = stopped(start, grid, lambda _: trains(1), ranks)
    successor = start(task_of(grid), ranks)
    until(lambda: trains(2), "the successor trains")
    successor.stop()
    wake_up(stale, grid, ranks)
    step = heartbeat(grid)["step"]
    successor.send(signal.SIGCONT)
    until(lambda: heartbeat(grid)["step"] > step, "the successor goes on")


def refuse_to_requeue(job: str) -> bool:
    raise QueueUnreachable(f"no answer for {job}")


def heartbeat(grid: Grid) -> dict:
    try:
        (path,) = grid.run.progress.glob("*.json")
        return json.loads(path.read_text())
    except (ValueError, FileNotFoundError):
        return {}


@pytest.mark.slow
def test_pre_training_that_wakes_up_after_its_successors_end(grid, start):
    def task(grid: Grid) -> ModuleCall:
        return ModuleCall("jobs.pretrain", (str(task_of(grid, grid.cells[:1], "pretrain")),))

    def is_trained() -> bool:
        return any(grid.run.root.glob("backbones/*.json"))

    def saved(grid: Grid) -> bool:
        return any(grid.run.root.glob("checkpoints/*/step-*")) and not is_trained()

    stale = stopped(start, grid, saved, task=task)
    successor = start(task(grid))
    assert successor.end() == [0], successor.log
    assert "resuming at step" in successor.log and is_trained()
    wake_up(stale, grid)


@pytest.fixture
def two_starts(grid, alone) -> tuple[JobRun, Task]:
    """A start that has a successor and has not noticed yet."""
    task = read_task(task_of(grid))
    stale, _ = (JobRun(task, alone, StopRequest(), {}) for _ in range(2))
    return stale, task


def test_a_stale_start_writes_no_heartbeat_and_gives_up_at_the_next_edge(two_starts):
    stale, task = two_starts
    assert stale.agree() is Action.GO_ON  # a listing a heartbeat is enough
    stale.heartbeat("training", 3, 20)
    assert not list(task.paths.progress.glob("*"))
    with pytest.raises(Superseded):
        stale.agree()


def test_a_heartbeat_that_could_not_be_written_once_is_forgiven_when_the_next_is(grid, alone):
    task = read_task(task_of(grid))
    job = JobRun(task, alone, StopRequest(), {})
    task.paths.progress.write_text("a file in the way")
    job.heartbeat("training", 1, 20, force=True)
    task.paths.progress.unlink()
    job.heartbeat("training", 2, 20, force=True)
    assert job.agree() is Action.GO_ON
    assert read_json(task.paths.progress_of(task.name))["step"] == 2


def test_a_stale_start_marks_no_cell_as_failed(two_starts, grid, alone, streets):
    stale, task = two_starts
    trainer = trainees_of(task, streets, alone)[0]
    trainer.failure = "the loss was nan at step 3 of 20"
    with pytest.raises(Superseded):
        stale.give_up(trainer, 3)
    assert not task.paths.failure(trainer.cell.signature).exists()


def test_a_stale_start_does_not_finish_an_evaluation(two_starts, streets, alone):
    stale, task = two_starts
    trainers = trainees_of(task, streets, alone)
    backbone = load_backbone(task.cells[0], task.paths, alone).module
    with pytest.raises(Superseded):
        train.evaluate_cells(stale, trainers, backbone, streets, 20)


@pytest.mark.parametrize(("module", "moment"), [(train, "save_head"), (counts_file, "file_sha256")])
def test_counts_of_a_start_that_is_cut_off_while_it_publishes_do_not_count(
    grid, streets, alone, monkeypatch, module, moment
):
    task = read_task(task_of(grid))
    backbone = load_backbone(task.cells[0], task.paths, alone)
    job = JobRun(task, alone, StopRequest(), {})
    trainers = trainees_of(task, streets, alone)
    counts = [Counts.zeros(len(streets.classes), task.cells[0].protocol.bins)] * len(trainers)
    honest = getattr(module, moment)

    def a_successor_starts_then(*arguments):
        result = honest(*arguments)
        JobRun(task, alone, StopRequest(), {})
        return result

    monkeypatch.setattr(module, moment, a_successor_starts_then)
    with pytest.raises(Superseded):
        train.publish(job, trainers[:1], counts[:1], streets, backbone)
    assert not list(task.paths.counts.glob("*.json"))
    assert bool(list(task.paths.counts.glob("*.h5"))) == (module is counts_file)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, None])
def test_a_stopped_start_hands_its_job_back_to_slurm(two_starts, monkeypatch, number):
    """The cause of the stop and the rank do not matter: Slurm knows if the job was cancelled."""
    _, task = two_starts
    newest = JobRun(task, two_starts[0].group, StopRequest(), {})
    newest.stop.signal = number
    handed_back = []
    monkeypatch.setattr(slurm_cli, "requeue", handed_back.append)
    newest.group.env = RankEnv("slurm", 0, 1, 0, node="here", job_id="4711", start_id="")
    train.stop_and_requeue(newest, 3, 20)
    assert handed_back == ["4711"]


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (lambda _: True, "requeued"),
        (lambda _: False, "not requeued; run grid again to resume"),
        (refuse_to_requeue, "not requeued; run grid again to resume"),
    ],
)
def test_a_stopped_start_says_what_becomes_of_its_job(
    two_starts, alone, monkeypatch, capsys, answer, line
):
    newest = JobRun(two_starts[1], alone, StopRequest(), {})
    newest.stop.signal = signal.SIGTERM
    said_before = []

    def requeue(job):
        said_before.append(capsys.readouterr().err)
        return answer(job)

    monkeypatch.setattr(slurm_cli, "requeue", requeue)
    alone.env = RankEnv("slurm", 0, 1, 0, node="here", job_id="4711", start_id="")
    assert train.stop_and_requeue(newest, 3, 20) == (line == "requeued")
    assert "requeued" not in said_before[0]  # but the cause of the stop, for `exit_cause`
    assert said_before[0].endswith(": stopped by SIGTERM after step 3 of 20\n")
    assert capsys.readouterr().err.endswith(f": {line}\n")


def test_a_stale_start_hands_no_job_back_to_slurm(two_starts, monkeypatch):
    stale, _ = two_starts
    stale.stop.signal = signal.SIGUSR2
    monkeypatch.setattr(slurm_cli, "requeue", lambda job: pytest.fail(f"requeued {job}"))
    stale.group.env = RankEnv("slurm", 0, 1, 0, node="here", job_id="4711", start_id="")
    with pytest.raises(Superseded):
        train.stop_and_requeue(stale, 3, 20)


@pytest.mark.parametrize("moment", ["before it writes", "between weights and record"])
def test_a_stale_pre_training_publishes_no_backbone(grid, streets, alone, monkeypatch, moment):
    consumer = grid.cells[0]
    task = read_task(task_of(grid, [consumer]))
    trained = task.model_copy(update={"cells": (pretraining_cell(consumer),)})
    stale = JobRun(trained, alone, StopRequest(), {})
    (trainer,) = trainees_of(trained, streets, alone)

    def successor(path: Path) -> str:
        JobRun(trained, alone, StopRequest(), {})
        return file_sha256(path)

    if moment == "before it writes":
        successor(grid.path)
    monkeypatch.setattr(pretrain, "file_sha256", successor)
    with pytest.raises(Superseded):
        publish_backbone(stale, trainer, consumer, streets, Counts.zeros(8, 7))
    left = {path.suffix for path in task.paths.root.glob("backbones/*")}
    assert left == (set() if moment == "before it writes" else {".pt"})  # the record makes it one


def test_whose_run_was_deleted_ends_and_does_not_make_it_anew(grid, alone):
    task = read_task(task_of(grid))
    job = JobRun(task, alone, StopRequest(), {})
    shutil.rmtree(grid.run.root)
    job.heartbeat("training", 3, 20)
    with pytest.raises(Superseded):
        job.agree()
    assert not [path for path in grid.run.root.rglob("*") if path.is_file()]


def trainees_of(task: Task, streets: Manifest, group) -> list:
    backbone = load_backbone(task.cells[0], task.paths, group)
    return train.make_trainers(task, streets, backbone, group)[1]
