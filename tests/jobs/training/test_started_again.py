"""A job that is started again after its work is done does nothing: people run old scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import pretrain, train
from jobs.spec.counts_file import counted_cells
from pipeline.config.grid_file import Grid
from tests.jobs.small_runs import assert_all_same, assert_same, grid_of, results, task_of

LOSSES = ("CE", "DLNWCE", "FL")


@pytest.fixture
def grid(tmp_path, streets) -> Grid:
    return grid_of(tmp_path, streets.folder, *LOSSES, workers=0, epochs=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, streets) -> dict:
    grid = grid_of(tmp_path_factory.mktemp("once"), streets.folder, *LOSSES, workers=0, epochs=1)
    assert train.main([str(task_of(grid))]) == 0
    return results(grid.run)


def files(folder: Path) -> dict[str, int]:
    """Every file of a run but those where ranks meet, and when it was written."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.stat().st_mtime_ns for path in found if "rendezvous" not in path.parts}


def test_a_finished_task_ends_at_once_and_leaves_everything_as_it_is(grid, capsys):
    task = task_of(grid)
    assert train.main([str(task)]) == 0
    before = files(grid.run.root)
    capsys.readouterr()
    assert train.main([str(task)]) == 0
    assert capsys.readouterr().err == "bundle: 3 cells are done already; there is nothing to do\n"
    assert files(grid.run.root) == before


def test_only_the_cells_that_are_left_are_trained(grid, undisturbed, capsys):
    first = [cell for cell in grid.cells if cell.loss.name == "CE"]
    assert train.main([str(task_of(grid, first))]) == 0
    assert train.main([str(task_of(grid))]) == 0
    assert "bundle: 1 cells are done already; the other 2 go on\n" in capsys.readouterr().err
    assert_all_same(results(grid.run), undisturbed)  # which finds none that was trained twice


def test_a_cell_whose_counts_are_lost_is_trained_again(grid, undisturbed):
    first = [cell for cell in grid.cells if cell.loss.name == "CE"]
    assert train.main([str(task_of(grid, first))]) == 0
    (counts,) = grid.run.counts.glob("*.h5")
    counts.write_bytes(counts.read_bytes()[:-1])
    (grid.run.counts / "other.json").write_text("{")
    assert counted_cells(grid.run.counts) == set()
    assert train.main([str(task_of(grid, first))]) == 0
    assert len(counted_cells(grid.run.counts)) == 1
    (name,) = [cell.name for cell in first]
    counts.with_suffix(".json").unlink()
    (grid.run.counts / "other.json").unlink()
    assert_same(results(grid.run)[name], undisturbed[name])


def test_a_trained_backbone_is_not_trained_again(grid, capsys):
    task = task_of(grid, grid.cells[:1], "pretrain")
    assert pretrain.main([str(task)]) == 0
    before = files(grid.run.root)
    capsys.readouterr()
    assert pretrain.main([str(task)]) == 0
    assert capsys.readouterr().err == (
        "pretrain: the backbone is trained already; there is nothing to do\n"
    )
    assert files(grid.run.root) == before
