"""What `--wait` says when the jobs have ended."""

import pytest

from pipeline.wait import wait_for
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import small_grid

JOBS = {"prep": ["job1"], "reduce": ["job2"], "report": ["job3"]}


@pytest.mark.parametrize(
    "ending", ["error: street.png is cut short; mend it", "ValueError: operands do not fit"]
)
def test_the_first_stage_that_failed_is_named_and_no_older_table_is_shown(tmp_path, capsys, ending):
    grid = small_grid(tmp_path)
    grid.run.report.mkdir(parents=True)
    (grid.run.report / "index.html").write_text("a page of another day")
    queue = FakeQueue(tmp_path)
    (tmp_path / "job1.err").write_text(f"streets: shards: 1 of 2\n{ending}\n")
    (tmp_path / "job2.err").write_text("error: there is no packed data set\n")
    assert wait_for(grid, queue, JOBS, tuple(JOBS)) == 2
    said = capsys.readouterr()
    assert said.err == f"prep: {ending}\n"
    assert "page:" not in said.out


def test_cells_that_did_not_finish_are_named(tmp_path, capsys):
    grid = small_grid(tmp_path)
    assert wait_for(grid, FakeQueue(tmp_path), {"grid": ["job1"]}, ("grid",)) == 1
    said = capsys.readouterr().err
    assert said.splitlines() == [f"{cell.name}: missing" for cell in grid.cells]
