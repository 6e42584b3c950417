"""Cells that are not done for one reason are told of once."""

from __future__ import annotations

from rich.console import Console

from pipeline.tracking.display import cells_table, reason_lines
from pipeline.tracking.survey import CellState
from tests.pipeline.grids import small_grid


def test_reasons_that_differ_in_names_and_numbers_alone_are_one(tmp_path):
    cells = small_grid(tmp_path).cells
    reasons = [
        f"the loss of {cells[0].name} was nan at step 2 of 6; delete x/{cells[0].signature}.json",
        f"the loss of {cells[1].name} was nan at step 14 of 6; delete x/{cells[1].signature}.json",
        "the loss was 1.5e-3",
        "the loss was 2.5e+10",
        "error: tasks/streets-seed0-0123456789abcdef.json is damaged",
        "error: tasks/streets-seed0-fedcba9876543210.json is damaged",
        "error: disk full",
        "",
    ]
    states = [CellState(c, "failed", why=why) for c, why in zip(cells, reasons, strict=True)]
    states[7] = CellState(cells[7], "missing")
    assert list(reason_lines(states)) == [
        f"2 cells: failed {reasons[0]}; for example {cells[0].name}",
        f"2 cells: failed {reasons[2]}; for example {cells[2].name}",
        f"2 cells: failed {reasons[4]}; for example {cells[4].name}",
        f"{cells[6].name}: failed error: disk full",
        f"{cells[7].name}: missing",
    ]


def test_cells_that_failed_for_one_reason_share_a_row(tmp_path):
    cells = small_grid(tmp_path).cells
    states = [CellState(cell, "failed", why="error: disk full") for cell in cells[:6]]
    states += [CellState(cell, "running", step=3, total=6) for cell in cells[6:]]
    console = Console(width=160)
    with console.capture() as shown:
        console.print(cells_table(states))
        console.print(cells_table(states, whole=True))
    text = shown.get()
    assert f"{cells[0].name} and 5 more" in text
    assert text.count("error: disk full") == 1 + 6
    assert text.count("running") == 2 + 2
