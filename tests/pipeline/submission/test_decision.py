"""The table of the docs says which command sends a cell again, as the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from hpc.scheduler.exit_cause import Cause
from pipeline.submission.decision import SUBMITTED_BY, cells_to_submit
from pipeline.tracking.survey import NOT_FINITE, survey
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import small_grid

PAGE = Path(__file__).parents[3] / "docs/explanation/submission.md"
COMMANDS = ("grid", "retry", "submit --wait", "retry --wait", "grid --retrain stale")


def test_the_docs_show_the_table_of_resubmission():
    rows = re.findall(r"^\| ([a-z ]+) \|" + r" (yes|no) \|" * 5 + "$",
                      PAGE.read_text(encoding="utf-8"), re.MULTILINE)  # fmt: skip
    shown = {
        reason: {command for command, word in zip(COMMANDS, words, strict=True) if word == "yes"}
        for reason, *words in rows
    }
    assert shown == {reason: set(commands) for reason, commands in SUBMITTED_BY.items()}


def test_the_table_has_every_cause_with_which_a_job_may_end():
    assert SUBMITTED_BY.keys() >= {*get_args(Cause), NOT_FINITE}


@pytest.mark.parametrize(("command", "number"), [*zip(COMMANDS, (8, 0, 8, 0, 8), strict=True)])
def test_cells_that_were_never_sent(tmp_path, shards, command, number):
    grid = small_grid(tmp_path)
    assert len(cells_to_submit(survey(grid, FakeQueue(tmp_path)), command)) == number
