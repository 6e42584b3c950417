"""Cells that start from a weights file of one's own: wherever the file lies they are the same, and
results are refused where it holds something else than what they were trained with."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc.cli import UserError
from hpc.distributed.mpi import World
from hpc.storage.atomic import file_sha256, read_json, write_json
from pipeline.config.grid_file import Grid
from pipeline.reduce import reduce_grid
from pipeline.scores.results_file import read_results
from tests.pipeline.grids import finish, small_grid


def grid_with(folder: Path, weights: Path) -> Grid:
    return small_grid(folder, ('weights = "none"', f'weights = "{weights}"'))


@pytest.fixture
def trained(tmp_path, shards) -> Grid:
    """A grid whose cells were all trained with `w.pt`."""
    (tmp_path / "w.pt").write_bytes(b"the weights")
    grid = grid_with(tmp_path, tmp_path / "w.pt")
    index = finish(grid, grid.cells, "all").with_suffix(".json")
    record = read_json(index)
    record["cells"]["backbone"] = [file_sha256(tmp_path / "w.pt")] * len(grid.cells)
    write_json(index, record)
    return grid


def cells_reduced(grid: Grid) -> int:
    reduce_grid(grid, World())
    return len(read_results(grid.run.results).datasets[0].cells)


def test_the_file_may_move(tmp_path, trained):
    assert cells_reduced(trained) == 8
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "w.pt").rename(tmp_path / "elsewhere/w.pt")
    moved = grid_with(tmp_path, tmp_path / "elsewhere/w.pt")
    assert [cell.signature for cell in moved.cells] == [cell.signature for cell in trained.cells]
    assert cells_reduced(moved) == 8


def test_a_file_that_is_gone_since_takes_no_result_with_it(tmp_path, trained):
    (tmp_path / "w.pt").unlink()
    assert cells_reduced(trained) == 8


def test_a_file_that_changed_is_refused(tmp_path, trained):
    (tmp_path / "w.pt").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"with another backbone than .*/w.pt holds now"):
        cells_reduced(trained)


def test_another_file_of_the_same_name_is_refused(tmp_path, trained):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/w.pt").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"another backbone than .*/other/w.pt holds now"):
        cells_reduced(grid_with(tmp_path, tmp_path / "other/w.pt"))
