"""`--wait` reports how the jobs ended."""

import pytest

from hpc.scheduler.base import QueueUnreachable
from pipeline.submission import wait
from pipeline.submission.wait import wait_for
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import finish, small_grid
from tests.pipeline.stories import end

JOBS = {"prep": ["job1"], "reduce": ["job2"], "report": ["job3"]}


@pytest.mark.parametrize(
    "ending", ["error: street.png is cut short; fix it", "ValueError: operands do not fit"]
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


@pytest.mark.parametrize(
    ("word", "said"),
    [("OUT_OF_MEMORY", "out of memory"), ("TIMEOUT", "time limit"), ("CANCELLED", "cancelled"),
     ("failed", "killed"), ("dependency failed", "dependency failed")],
)  # fmt: skip
def test_a_stage_that_ended_without_an_error_line_did_not_succeed(tmp_path, capsys, word, said):
    grid, queue = small_grid(tmp_path), FakeQueue(tmp_path)
    end(queue, "job1", "streets: 4 of 8 cells", word=word)
    assert wait_for(grid, queue, {"reduce": ["job1"]}, ("reduce",)) == 2
    assert capsys.readouterr().err == f"reduce: {said}\n"


@pytest.mark.parametrize("word", ["COMPLETED", "succeeded", ""])
def test_a_stage_that_succeeded_gives_exit_code_0(tmp_path, word):
    grid, queue = small_grid(tmp_path), FakeQueue(tmp_path)
    end(queue, "job1", "streets: 8 of 8 cells", word=word)
    assert wait_for(grid, queue, {"reduce": ["job1"]}, ("reduce",)) == 0


def test_cells_that_did_not_finish_are_named(tmp_path, capsys):
    grid = small_grid(tmp_path)
    assert wait_for(grid, FakeQueue(tmp_path), {"grid": ["job1"]}, ("grid",)) == 1
    said = capsys.readouterr().err
    assert said == f"8 cells: missing; for example {grid.cells[0].name}\n"


class Silent(FakeQueue):
    """It answers no question for a while, and then the job has ended."""

    silences = 3

    def job_states(self, ids):
        self.silences -= 1
        if self.silences >= 0:
            raise QueueUnreachable("squeue failed: Unable to contact slurm controller")
        return super().job_states(ids)


def test_it_waits_for_a_controller_that_is_away_and_says_so_once(
    tmp_path, streets, monkeypatch, capsys
):
    monkeypatch.setattr(wait, "_CLUSTER_POLL_SECONDS", 0.01)
    grid, queue = small_grid(tmp_path, (f"{tmp_path}/streets", str(streets))), Silent(tmp_path)
    finish(grid, grid.cells, "task")
    assert wait_for(grid, queue, {"grid": ["job1"]}, ("grid",)) == 0
    assert queue.silences < 0
    assert capsys.readouterr().err == (
        "squeue failed: Unable to contact slurm controller; waiting for Slurm\n"
    )
