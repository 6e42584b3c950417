"""Cells whose data set was corrected since: a state of their own, which nobody reduces, resumes or
trains anew without the user's word."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from data_prep.pack import pack
from data_prep.shards.manifest import Manifest
from hpc.cli import UserError
from hpc.storage import checkpoint
from hpc.storage.atomic import write_json
from hpc.storage.fencing import claim
from jobs.spec.cell import pretraining_cell
from jobs.spec.counts_file import counted_cells
from pipeline import reduce, retry, status, submit
from pipeline.config.grid_file import Grid
from pipeline.scores.results_file import read_results
from pipeline.submission.decision import cells_to_submit
from pipeline.submission.submitter import submit as send
from pipeline.tracking.survey import survey
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import finish, small_grid
from tests.pipeline.stories import cells_of, words, work

WITH_STALE = partial(cells_to_submit, command="grid --retrain stale")
PRETRAIN = ('weights = "none"', 'weights = "pretrain"\npretrain = {batch_size = 2}')


@pytest.fixture
def grid(tmp_path, shards) -> Grid:
    """The small grid, with a packed data set of its own."""
    return small_grid(tmp_path)


@pytest.fixture
def queue(tmp_path) -> FakeQueue:
    return FakeQueue(tmp_path)


def fingerprint(grid: Grid) -> str:
    return Manifest.load(grid.datasets["streets"].shards).fingerprint


def corrected(grid: Grid) -> None:
    """One label map is drawn anew and the data set packed again."""
    Image.new("L", (40, 32)).save(label_map(grid))
    before = fingerprint(grid)
    pack("streets", grid.datasets["streets"], processes=1)
    assert fingerprint(grid) != before


def label_map(grid: Grid) -> Path:
    return Path(grid.datasets["streets"].root) / "trainannot/train_000000.png"


def interrupted(grid: Grid, cells, step: int = 3) -> None:
    """The checkpoint of a job that was killed on the present data."""
    key, signatures = cells[0].bundle_key, [cell.signature for cell in cells]
    mine = claim(grid.run.generations(key), signatures)
    record = {"inputs": {"data set": fingerprint(grid)}}
    entries = {signature: {} for signature in signatures}
    checkpoint.save(grid.run.checkpoints(key), step, mine, entries, record)


def diverged(grid: Grid, cell) -> None:
    record = {"cell": cell.name, "step": 2, "reason": "the loss was nan",
              "inputs": {"data set": fingerprint(grid)}}  # fmt: skip
    write_json(grid.run.failure(cell.signature), record)


@pytest.fixture
def stale(grid) -> Grid:
    """Five cells done, one that diverged and two interrupted, all on what the data set was."""
    first, second = ([c for c in grid.cells if c.seed == seed] for seed in (0, 1))
    finish(grid, first, "streets-seed0")
    finish(grid, second[:1], "streets-seed1")
    diverged(grid, second[1])
    interrupted(grid, second[2:])
    corrected(grid)
    return grid


def test_they_are_counted_and_a_submission_leaves_them(stale, queue, capsys):
    assert words(stale, queue) == {"stale": 8}
    assert {cell.why for cell in survey(stale, queue).cells} == {"its data set has changed"}
    capsys.readouterr()
    assert send(stale, queue, ["grid"]) == {"grid": []}
    said = capsys.readouterr().out.splitlines()
    line = (
        "8 cells are stale (their data set has changed) and are left out; "
        f"`python -m pipeline.submit grid {stale.path} --retrain stale` trains them again"
    )
    assert said == ["small: 8 cells: 8 stale", line]
    assert status.main([str(stale.path)]) == 0
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert retry.choose(survey(stale, queue)) == []
    with pytest.raises(
        UserError, match=r"is stale \(its data set has changed\); submit grid with --retrain"
    ):
        retry.choose(survey(stale, queue), stale.cells[:1])


def test_on_the_users_word_they_are_trained_anew_and_nothing_is_lost(stale, queue):
    before = sorted(path.read_bytes() for path in stale.run.counts.iterdir())
    send(stale, queue, ["grid"], WITH_STALE)
    sent = [cell.signature for job in queue.jobs for cell in cells_of(queue, job)]
    assert sorted(sent) == sorted(cell.signature for cell in stale.cells)
    assert words(stale, queue) == {"waiting": 8}
    assert survey(stale, queue).steps == {}
    assert counted_cells(stale.run.counts) == set()  # else the jobs would leave them out
    aside = stale.run.stale
    assert sorted(path.read_bytes() for path in (aside / "counts").iterdir()) == before
    assert [p.name for p in (aside / "failures").iterdir()] == [f"{stale.cells[3].signature}.json"]
    assert len(list(aside.glob("checkpoints/*/step-000000003-g1/index.json"))) == 1

    for cell in stale.cells:
        finish(stale, [cell], f"again-{cell.signature}")
    assert words(stale, queue) == {"done": 8}


def test_a_dry_run_moves_nothing(stale, queue, capsys):
    assert submit.main(["grid", str(stale.path), "--retrain", "stale", "--dry-run"]) == 0
    assert "would submit 2 jobs for 8 cells" in capsys.readouterr().out
    assert words(stale, queue) == {"stale": 8} and not stale.run.stale.exists()


def test_where_the_images_are_restored_all_is_as_it_was(grid, queue):
    label = label_map(grid).read_bytes()
    finish(grid, grid.cells, "all")
    corrected(grid)
    assert words(grid, queue) == {"stale": 8}
    label_map(grid).write_bytes(label)
    pack("streets", grid.datasets["streets"], processes=1)
    assert words(grid, queue) == {"done": 8}


def test_a_reduction_leaves_them_out_with_one_line(grid, capsys):
    finish(grid, grid.cells[:3], "before")
    corrected(grid)
    finish(grid, grid.cells[4:], "after")
    capsys.readouterr()
    assert reduce.main([str(grid.path)]) == 0
    line = (
        "3 cells are stale (their data set has changed) and are left out; "
        f"`python -m pipeline.submit grid {grid.path} --retrain stale` trains them again"
    )
    assert capsys.readouterr().out.splitlines()[0] == f"warning: {line}"
    results = read_results(grid.run.results)
    assert results.record["missing"] == [grid.cells[3].name]
    assert line in results.record["notes"]
    assert [c["signature"] for c in results.datasets[0].cells] == [
        c.signature for c in grid.cells[4:]
    ]


@pytest.mark.parametrize("trained", [True, False])
def test_a_backbone_of_other_data_is_not_used(tmp_path, shards, queue, trained):
    """Nor is its training resumed: the cells that need it wait for the user's word."""
    grid = small_grid(tmp_path, PRETRAIN)
    cell = grid.cells[0]
    path = grid.run.backbone(cell.backbone_key)
    if trained:
        write_json(path.with_suffix(".json"), {"manifest": fingerprint(grid)})
        path.write_bytes(b"weights")
    else:
        interrupted(grid, [pretraining_cell(cell)])
    assert words(grid, queue) == {"missing": 8}
    corrected(grid)
    assert words(grid, queue) == {"stale": 8} and cells_to_submit(survey(grid, queue), "grid") == []
    send(grid, queue, ["grid"], WITH_STALE)
    assert [call.module for call in queue.calls.values()].count("jobs.pretrain") == 1
    moved = grid.run.stale / path.relative_to(grid.run.root)
    assert moved.exists() == trained and not path.exists()
    assert checkpoint.find(grid.run.checkpoints(pretraining_cell(cell).bundle_key)) == ([], [])
    assert words(grid, queue) == {"waiting": 8}


def test_a_job_that_still_runs_on_the_earlier_data_runs_on(grid, queue):
    send(grid, queue, ["grid"])
    queue.jobs["job1"] = "running"
    interrupted(grid, [c for c in grid.cells if c.seed == 0])
    corrected(grid)
    assert words(grid, queue) == {"running": 4, "waiting": 4}
    queue.jobs["job1"] = "gone"
    assert words(grid, queue) == {"stale": 4, "waiting": 4}


def test_what_is_set_aside_twice_is_kept_twice(grid, queue):
    for number in (1, 2):
        finish(grid, grid.cells, "all")
        corrected(grid) if number == 1 else shutil.copyfile(
            label_map(grid).with_name("train_000001.png"), label_map(grid)
        )
        pack("streets", grid.datasets["streets"], processes=1)
        queue.jobs.clear()
        send(grid, queue, ["grid"], WITH_STALE)
    names = {path.name for path in (grid.run.stale / "counts").iterdir()}
    assert names == {f"all-g1.{end}" for end in ("h5", "json", "h5.2", "json.2")}


@pytest.mark.slow
def test_from_end_to_end(tmp_path, shards, queue):
    """Images are corrected after a whole run: `all` leaves the results, the user says so, and all
    is made anew, backbones too."""
    one_model = (', "deeplabv3_mobilenet_v3_large"]', "]")
    grid = small_grid(tmp_path, PRETRAIN, ("seeds = [0, 1]", "seeds = [0]"), one_model)
    stages = ("prep", "grid", "reduce")
    send(grid, queue, stages)
    work(queue)
    before, results = read_results(grid.run.results), grid.run.results.read_bytes()
    Image.new("L", (40, 32)).save(label_map(grid))

    send(grid, queue, stages)
    with pytest.raises(
        UserError, match=r"has 2 finished cells, but would now have 0,.* \(2 cells "
    ):
        work(queue)
    assert grid.run.results.read_bytes() == results
    assert words(grid, queue) == {"stale": 2}

    send(grid, queue, ["grid"], WITH_STALE)
    work(queue)
    assert words(grid, queue) == {"done": 2}
    assert reduce.main([str(grid.path)]) == 0
    after = read_results(grid.run.results)
    bins = [results.datasets[0].counts["class_bins"] for results in (before, after)]
    assert (bins[0] != bins[1]).any(axis=(1, 2, 3)).all()  # of every cell
    assert {path.name for path in grid.run.stale.iterdir()} == {"backbones", "counts", "progress"}


def test_retraining_goes_with_the_stage_that_trains(grid, capsys):
    with pytest.raises(SystemExit):
        submit.main(["all", str(grid.path), "--retrain", "stale"])
    assert "--retrain goes with the stage grid" in capsys.readouterr().err
