"""The logs of a cell's job, the error first."""

from __future__ import annotations

import pytest

from hpc.cli import UserError
from hpc.scheduler.job import START_PREFIX
from pipeline import logs
from pipeline.config.grid_file import Grid
from pipeline.submission.submitter import submit
from pipeline.tracking.submissions import Submission
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import small_grid

FIRST = "streets/fcn_mobilenet_v3_large/CE/0"
BUG = [
    "Traceback (most recent call last):",
    '  File "train.py", line 1, in main',
    "    train()",
    "ValueError: boom",
]


class ManyRanks(FakeQueue):
    """Each job has as many ranks as have written."""

    def log_files(self, job_id):
        return sorted(self._folder.glob(f"{job_id}_*_log.err"))


@pytest.fixture
def grid(tmp_path, streets) -> Grid:
    return small_grid(tmp_path, (f"{tmp_path}/streets", str(streets)))


@pytest.fixture
def queue(tmp_path, grid, monkeypatch) -> FakeQueue:
    """A queue in which job1 and job2 train a seed each."""
    queue = ManyRanks(tmp_path)
    monkeypatch.setattr(logs, "open_queue", lambda *_, **__: queue)
    submit(grid, queue, ["grid"])
    return queue


@pytest.fixture
def write(tmp_path):
    def log(job: str, rank: int, *lines: str, stream: str = "err") -> None:
        path = tmp_path / f"{job}_{rank}_log.{stream}"
        path.write_text("".join(f"{line}\n" for line in lines))

    return log


@pytest.fixture
def shown(grid, capsys):
    def command(*arguments: str) -> list[str]:
        capsys.readouterr()
        assert logs.main([*arguments[:1], str(grid.path), *arguments[1:]]) == 0
        return capsys.readouterr().out.splitlines()

    return command


def test_the_traceback_comes_first_whichever_rank_has_it(queue, write, shown, tmp_path):
    write("job1", 0, "step 3 of 6")
    write("job1", 1, "a warning", *BUG, "srun: error: n1: task 1: Exited with exit code 1")
    write("job1", 1, "loaded", stream="out")
    assert shown(FIRST) == [
        f"{FIRST}: job job1, 2 ranks, logs in {tmp_path}",
        "",
        "== rank 1 ended with",
        *BUG,
        "",
        "== job1_0_log.err",
        "step 3 of 6",
        "",
        "== job1_1_log.err",
        "a warning",
        *BUG,
        "srun: error: n1: task 1: Exited with exit code 1",
        "",
        "== job1_1_log.out",
        "loaded",
    ]


def test_a_refusal_says_more_than_the_traceback_of_another_rank(queue, write, shown):
    write("job1", 0, *BUG)
    write("job1", 1, "error: disk full; make room")
    assert shown(FIRST)[2:4] == ["== rank 1 ended with", "error: disk full; make room"]


def test_without_an_error_the_ranks_alone_are_shown_and_equal_ones_once(queue, write, shown):
    write("job1", 0, "step 3 of 6")
    write("job1", 1, "step 3 of 6")
    assert shown(FIRST)[1:] == [
        "",
        "== job1_0_log.err",
        "step 3 of 6",
        "",
        "== job1_1_log.err: as job1_0_log.err",
    ]


def test_the_last_lines_of_the_last_start_or_all(queue, write, shown):
    lines = [f"step {number}" for number in range(30)]
    write("job1", 0, f"{START_PREFIX}1-0-0: ", "old", f"{START_PREFIX}1-1-0: ", *lines)
    assert shown(FIRST)[2:] == ["== job1_0_log.err", *lines[-20:]]
    assert shown(FIRST, "--lines", "3")[2:] == ["== job1_0_log.err", *lines[-3:]]
    assert shown(FIRST, "--all")[3:5] == [f"{START_PREFIX}1-0-0: ", "old"]


def test_a_part_of_its_name_is_enough_where_no_other_has_it(queue, write, shown, grid):
    write("job2", 0, "of seed 1")
    name = "streets/deeplabv3_mobilenet_v3_large/DLNWCE/1"
    assert shown("deeplabv3_mobilenet_v3_large/DLNWCE/1")[0].startswith(f"{name}: job job2, 1 ra")
    with pytest.raises(UserError, match=r"'fcn' is part of 4 names: .*; give more of one"):
        logs.main(["fcn", str(grid.path)])
    with pytest.raises(UserError, match="did you mean 'streets/fcn_mobilenet_v3_large/CE/0' or"):
        logs.main(["streets/fcn_mobilenet_v3_large/C/0", str(grid.path)])
    with pytest.raises(UserError, match=r"has no cell .x.; see .python -m pipeline\.status "):
        logs.main(["x", str(grid.path)])


def test_a_stage_has_logs_too(queue, write, shown, grid):
    with pytest.raises(UserError, match="reduce has no logs: no job was submitted for it"):
        logs.main(["reduce", str(grid.path)])
    Submission(grid.run).submitted(["reduce"], ["job7"])
    assert shown("reduce") == ["reduce: job job7 has written nothing yet"]
    write("job7", 0, "error: no counts")
    assert shown("reduce")[3] == "error: no counts"


def test_while_a_new_job_waits_the_one_before_is_shown(queue, write, shown, grid):
    write("job1", 0, *BUG)
    queue.jobs["job1"] = "gone"
    submit(grid, queue, ["grid"])
    lines = shown(FIRST)
    assert lines[0] == f"{FIRST}: job job3 has written nothing yet; this is the one before"
    assert lines[1].startswith(f"{FIRST}: job job1, 1 ranks, ")
    write("job3", 0, "step 1 of 6")
    lines = shown(FIRST)
    assert lines[0].startswith(f"{FIRST}: job job3, ")
    assert lines[1] == "earlier jobs: job1"


def test_a_control_character_of_a_log_does_not_reach_the_terminal(queue, write, shown):
    write("job1", 0, "\x1b[2Jcleared")
    assert shown(FIRST)[-1] == "\\x1b[2Jcleared"
