"""`--profile`: a job says how long each of its parts took, and becomes what it would without."""

import json

import pytest

from hpc.distributed.timer import Stopwatch
from jobs import pretrain, train
from jobs.spec.task import read_task
from jobs.training.cell_trainer import CellTrainer
from jobs.training.timings import table
from pipeline import submit as command
from tests.jobs.cells import CLASS_WEIGHTS, a_cell, a_share
from tests.jobs.job_processes import jobs
from tests.jobs.small_runs import STEPS, assert_all_same, grid_of, results, task_of
from tests.pipeline.fake_queue import FakeQueue

PARTS = {"data", "backbone", "heads", "losses", "optimiser", "communication", "checkpoints",
         "other"}  # fmt: skip
LOSSES = ("CE", "WDLNWCE")


def profiles(run):
    return {path.stem: json.loads(path.read_text()) for path in run.profiles.glob("*.json")}


@pytest.fixture(scope="module")
def plain(streets, tmp_path_factory):
    """A run without a profile."""
    grid = grid_of(tmp_path_factory.mktemp("plain"), streets.folder, *LOSSES)
    assert train.main([str(task_of(grid))]) == 0
    return grid.run


def test_a_profiled_run_ends_with_the_same_bits(streets, plain, tmp_path, capfd):
    grid = grid_of(tmp_path, streets.folder, *LOSSES)
    assert train.main([str(task_of(grid)), "--profile"]) == 0
    assert_all_same(results(grid.run), results(plain))
    assert profiles(plain) == {}

    log = capfd.readouterr().err
    assert f"bundle (generation 1): profile of training: {STEPS} steps in " in log
    assert "steps a second, " in log and "profile of evaluation: 3 images in " in log
    found = profiles(grid.run)
    assert {*found} == {"bundle-g1-training", "bundle-g1-evaluation"}
    training, evaluation = found["bundle-g1-training"], found["bundle-g1-evaluation"]
    assert (training["steps"], evaluation["images"]) == (STEPS, 3)
    (parts,) = training["ranks"]
    assert parts.keys() == PARTS and all(seconds > 0 for seconds in parts.values())
    (parts,) = evaluation["ranks"]
    assert {"data", "backbone", "heads", "counts"} <= parts.keys()


def test_each_rank_of_a_job_is_told_apart(streets, tmp_path):
    grid = grid_of(tmp_path, streets.folder, "CE", profile=True)
    with jobs(tmp_path / "logs") as start:
        assert start(task_of(grid), 2).end() == [0, 0]
    first, second = profiles(grid.run)["bundle-g1-training"]["ranks"]
    assert first != second
    assert all(rank["communication"] > 0 and rank["heads"] > 0 for rank in (first, second))


def test_pre_training_has_a_profile_too(streets, tmp_path):
    grid = grid_of(tmp_path, streets.folder, "CE", profile=True)
    assert pretrain.main([str(task_of(grid, kind="pretrain"))]) == 0
    assert {*profiles(grid.run)} == {"pretrain-g1-training", "pretrain-g1-evaluation"}


def test_a_step_goes_through_each_head_and_back(alone, monkeypatch):
    """The gradient of a loss belongs to the loss until it reaches the head's output. A rank waits
    for the others when the head has all its gradients."""
    entered, left = [], "other"
    trainers = [CellTrainer(a_cell(loss), 3, CLASS_WEIGHTS, alone) for loss in LOSSES]
    alone.watch.start()
    monkeypatch.setattr(Stopwatch, "begin", lambda watch, part: entered.append(part))
    for trainer in trainers:
        trainer.step(*a_share(0), 0, 10)
    of_a_head = [
        "heads", left, "losses", left,
        "losses", "heads", "communication", left,
        "optimiser", left,
    ]  # fmt: skip
    assert entered == [*of_a_head, *of_a_head]


def test_the_table_gives_rates_shares_and_the_longest_part_first():
    """Two ranks, ten steps, eight seconds, of which half was waiting for data."""
    ranks = [{"data": 3.0, "heads": 5.0}, {"data": 5.0, "heads": 1.0, "communication": 2.0}]
    assert list(table("training", "steps", 10, ranks)) == [
        "profile of training: 10 steps in 8.00 s",
        "  1.250 steps a second, 2.500 without waiting for data",
        "  data           50.0%       4.00 s     400.00 ms each",
        "  heads          37.5%       3.00 s     300.00 ms each",
        "  communication  12.5%       1.00 s     100.00 ms each",
    ]


def test_nothing_done_has_no_rate():
    assert [*table("training", "steps", 0, [{"other": 0.5}])] == [
        "profile of training: 0 steps in 0.50 s"
    ]


def test_a_submission_with_profile_sends_the_same_cells_with_that_wish(
    streets, tmp_path, monkeypatch
):
    grid = grid_of(tmp_path, streets.folder, *LOSSES)
    queue = FakeQueue(tmp_path)
    monkeypatch.setattr(command, "open_queue", lambda *_, **__: queue)
    assert command.main(["grid", str(grid.path), "--profile"]) == 0
    (path,) = grid.run.tasks.glob("*.json")
    sent = read_task(path).cells
    assert [cell.protocol.profile for cell in sent] == [True, True]
    assert [cell.signature for cell in sent] == [cell.signature for cell in grid.cells]
