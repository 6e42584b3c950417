"""A damaged counts file costs its own cells and no others: it is named in one line that says what
to do, and doing it trains those cells anew and nothing else."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from data_prep.shards.manifest import Manifest
from hpc.cli import UserError
from hpc.storage.atomic import read_json, write_json
from jobs.spec import counts_file
from jobs.spec.counts_file import counted_cells
from pipeline import reduce, status
from pipeline.config.grid_file import Grid, read_grid
from pipeline.scores.results_file import read_results
from pipeline.submission.submitter import submit
from pipeline.submit import main
from pipeline.tracking.survey import survey
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import counts_of, finish, grid_file
from tests.pipeline.stories import cells_of, planned, words
from tests.pipeline.tracking.damages import DAMAGES, flip


def a_grid(folder: Path, streets: Path, *changes: tuple[str, str]) -> Grid:
    shards = (f'shards = "{folder}/streets"', f'shards = "{streets}"')
    return read_grid(grid_file(folder, shards, *changes))


def seed(grid: Grid, number: int) -> list:
    return [cell for cell in grid.cells if cell.seed == number]


@pytest.fixture
def grid(tmp_path, streets) -> Grid:
    """A run of two jobs, one a seed, both finished."""
    grid = a_grid(tmp_path, streets)
    for number in (0, 1):
        finish(grid, seed(grid, number), f"seed{number}")
    return grid


def warnings(capsys) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("warning: ")]


def assert_reduced(grid: Grid, cells) -> None:
    """The results hold these cells and no others, each with its own counts."""
    assert reduce.main([str(grid.path)]) == 0
    (dataset,) = read_results(grid.run.results).datasets
    assert [cell["signature"] for cell in dataset.cells] == [cell.signature for cell in cells]
    manifest = Manifest.load(grid.datasets["streets"].shards)
    for place, cell in enumerate(cells):
        assert dataset.counts_of(place).equals(counts_of(cell, manifest))


def planned_names(grid: Grid) -> list[str]:
    tasks = planned(grid, FakeQueue(grid.run.logs)).bundles
    return sorted(cell.name for task in tasks for cell in task.cells)


@pytest.mark.parametrize(("suffix", "damage"), DAMAGES)
def test_a_damaged_file_is_named_and_its_cells_alone_are_trained_anew(grid, capsys, suffix, damage):
    intact, lost = seed(grid, 0), seed(grid, 1)
    path = grid.run.counts_of("seed1", 1).with_suffix(suffix)
    damage(path)

    assert_reduced(grid, intact)
    (line,) = warnings(capsys)
    stem = str(path.with_suffix(""))
    named = next(word for word in line.split() if word.startswith(stem))
    assert "run grid again" in line or "delete it and run again" in line or "not there" in line

    if "delete it" in line:  # what the line says to do
        culprit = Path(named)
        shutil.rmtree(culprit) if culprit.is_dir() else culprit.unlink()
    assert planned_names(grid) == sorted(cell.name for cell in lost)

    finish(grid, lost, "seed1", generation=2)
    assert_reduced(grid, grid.cells)
    assert planned_names(grid) == []


def test_nothing_of_a_damaged_file_is_deleted_by_reduce_or_grid(grid):
    before = {path: path.read_bytes() for path in grid.run.counts.iterdir()}
    broken = grid.run.counts_of("seed1", 1)
    flip(broken)
    before[broken] = broken.read_bytes()
    reduce.main([str(grid.path)])
    planned_names(grid)
    assert {path: path.read_bytes() for path in grid.run.counts.iterdir()} == before


def test_grid_finds_counts_whose_content_alone_is_damaged(grid, tmp_path, capsys):
    queue = FakeQueue(tmp_path)
    intact, lost = seed(grid, 0), seed(grid, 1)
    path = grid.run.counts_of("seed1", 1)
    flip(path)
    damaged = path.read_bytes()
    assert words(grid, queue) == {"done": 8}, "status does not read all counts"
    assert main(["grid", str(grid.path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"warning: {path} is damaged (its checksum differs); run grid again" in said
    assert "would submit 1 jobs for 4 cells" in said

    submit(grid, queue, ["grid"])
    (line,) = warnings(capsys)
    assert line == (
        f"warning: {path} is damaged (its checksum differs); its cells are trained anew, its "
        "index is seed1-g1.json-damaged now"
    )
    assert cells_of(queue, "job1") == tuple(lost)
    assert words(grid, queue) == {"done": 4, "waiting": 4}
    assert counted_cells(grid.run.counts) == {cell.signature for cell in intact}
    assert_reduced(grid, intact)
    finish(grid, lost, "seed1", generation=2)
    assert_reduced(grid, grid.cells)
    assert warnings(capsys) == []
    assert path.read_bytes() == damaged, "nothing is deleted"
    assert submit(grid, queue, ["grid"]) == {"grid": []}


def test_counts_that_cannot_be_read_now_are_left_alone(grid, tmp_path, monkeypatch, capsys):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(counts_file, "file_sha256", fail)
    assert submit(grid, FakeQueue(tmp_path), ["grid"]) == {"grid": []}
    assert warnings(capsys) == []


def test_the_counts_of_another_grid_change_nothing(grid, tmp_path, streets, capsys):
    assert_reduced(grid, grid.cells)
    expected = grid.run.results.read_bytes()
    (tmp_path / "other").mkdir()
    other = a_grid(tmp_path / "other", streets, ("seeds = [0, 1]", "seeds = [7]"),
                   ("batch_size = 2", "batch_size = 2\nbins = 3"))  # fmt: skip
    path = finish(other, other.cells, "of-another")
    for file in (path, path.with_suffix(".json")):
        shutil.copy(file, grid.run.counts)
    assert_reduced(grid, grid.cells)
    assert grid.run.results.read_bytes() == expected
    assert warnings(capsys) == []


def test_a_file_under_the_index_of_another_is_not_taken_for_it(grid, capsys):
    one, other = (grid.run.counts_of(f"seed{number}", 1) for number in (0, 1))
    shutil.copy(one, other)
    assert_reduced(grid, seed(grid, 0))
    (line,) = warnings(capsys)
    assert line.startswith(f"warning: {other} is damaged (its checksum differs); delete it")


# --- odd things in a run directory ------------------------------------------------------------


def test_odd_things_in_a_run_directory_are_lines_and_no_tracebacks(grid, capsys):
    """A stray file, a folder called x.json, an empty record, and one that cannot be read."""
    for folder in (grid.run.counts, grid.run.submitted, grid.run.progress, grid.run.failures):
        folder.mkdir(exist_ok=True)
        (folder / "notes.txt").write_text("do not delete")
        (folder / ".hidden").write_bytes(b"\xff")
        (folder / "x.json").mkdir()
        (folder / "empty.json").touch()
        (folder / "loop.json").symlink_to("loop.json")
        (folder / "list.json").write_text("[1, 2]")
        write_json(folder / "other.json", {"made": "elsewhere"})
    broken = ["empty", "list", "loop", "other", "x"]
    problems = survey(grid, FakeQueue(grid.run.logs)).problems
    assert [line.split()[0] for line in sorted(problems)] == [
        str(grid.run.counts / f"{name}.json") for name in broken
    ]
    assert all("delete it and run" in line for line in problems)
    assert_reduced(grid, grid.cells)
    assert len(warnings(capsys)) == len(broken)
    assert status.main([str(grid.path)]) == 0
    assert capsys.readouterr().out.count("done") >= len(grid.cells)


@pytest.mark.parametrize("name", ["counts", "submitted"])
def test_what_cannot_be_listed_is_not_taken_for_nothing(grid, name):
    """Else all cells would be trained again, or submitted twice."""
    folder = grid.run.root / name
    if folder.exists():
        folder.rename(grid.run.root / "aside")
    folder.symlink_to(folder.name)
    with pytest.raises(UserError, match=rf"^cannot list {folder}: .*; it should be a folder"):
        survey(grid, FakeQueue(grid.run.logs))


def test_the_record_of_a_failure_that_cannot_be_read_is_said_so(tmp_path, streets):
    grid = a_grid(tmp_path, streets)
    cell = grid.cells[0]
    grid.run.failure(cell.signature).mkdir(parents=True)
    (state,) = (s for s in survey(grid, FakeQueue(grid.run.logs)).cells if s.cell == cell)
    assert state.state == "failed"
    assert state.why.startswith("its record is damaged; change its settings, or try again with ")


# --- one bundle, two backbones ----------------------------------------------------------------


def with_backbone(grid: Grid, cells, task: str, sha256: str) -> Path:
    path = finish(grid, cells, task)
    index = read_json(path.with_suffix(".json"))
    cells = {**index["cells"], "backbone": [sha256] * len(cells)}
    write_json(path.with_suffix(".json"), {**index, "cells": cells})
    return path


def test_cells_that_were_counted_with_different_backbones_are_not_compared(tmp_path, streets):
    grid = a_grid(tmp_path, streets)
    cells = seed(grid, 0)
    one = with_backbone(grid, cells[:2], "before", "aa" * 32)
    other = with_backbone(grid, cells[2:], "after", "bb" * 32)
    with pytest.raises(UserError) as refused:
        reduce.main([str(grid.path)])
    assert str(refused.value) == (
        f"{other} was counted with another backbone than {one} was, and their cells would be "
        "compared; delete the file of the backbone that is not wanted and run grid again"
    )
    assert not grid.run.results.exists()
    one.unlink()
    assert_reduced(grid, cells[2:])
    assert planned_names(grid) == sorted(cell.name for cell in [*cells[:2], *seed(grid, 1)])


def test_cells_of_a_backbone_that_was_trained_anew_are_refused(tmp_path, streets):
    grid = a_grid(tmp_path, streets, ('weights = "none"', 'weights = "pretrain"'))
    path = with_backbone(grid, grid.cells, "before", "aa" * 32)
    record = {
        "sha256": "aa" * 32,
        "model": "fcn_mobilenet_v3_large",
        "dataset": "streets",
        "protocol": {"epochs": 7},
        "seed": 3,
        "scores": {"acc": 0.75, "rec": 0.5},
    }
    backbone = grid.run.backbone(grid.cells[0].backbone_key)
    write_json(backbone.with_suffix(".json"), record)
    assert_reduced(grid, grid.cells)
    write_json(backbone.with_suffix(".json"), {**record, "sha256": "bb" * 32})
    with pytest.raises(UserError) as refused:
        reduce.main([str(grid.path)])
    assert str(refused.value).startswith(
        f"{path} was counted with another backbone than {backbone} holds now, and their cells"
    )


def test_the_record_of_a_backbone_that_is_damaged_is_a_note(tmp_path, streets):
    grid = a_grid(tmp_path, streets, ('weights = "none"', 'weights = "pretrain"'))
    finish(grid, grid.cells, "all")
    record = grid.run.backbone(grid.cells[0].backbone_key).with_suffix(".json")
    record.parent.mkdir()
    record.write_text(json.dumps({"checksum": "0"}))
    assert_reduced(grid, grid.cells)
    note = read_results(grid.run.results).record["notes"][0]
    assert note == f"{record} is damaged (its checksum differs); delete it and run again"
