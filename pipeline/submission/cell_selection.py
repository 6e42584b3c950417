"""Which cells a submission sends, of those that a survey finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jobs.spec.cell import Cell
from pipeline.tracking.survey import NOT_FINITE, Survey

Choice = Callable[[Survey], Sequence[Cell]]


def to_do(state: Survey) -> list[Cell]:
    """All cells that are neither done, failed for good, nor on their way."""
    on_their_way = set(state.active_jobs)  # also those that nobody starts at the moment
    return state.held + [
        cell.cell
        for cell in state.cells
        if cell.state in ("missing", "interrupted", "failed")
        and cell.cause != NOT_FINITE
        and cell.job not in on_their_way
        and state.fits(cell.cell)
    ]


def with_stale(state: Survey) -> list[Cell]:
    """As `to_do`, and the cells that were made from other data, to be trained anew."""
    stale = [cell.cell for cell in state.cells if cell.state == "stale"]
    return to_do(state) + [cell for cell in stale if state.fits(cell)]


def unsent(state: Survey) -> list[Cell]:
    """Those that were not sent yet: what `--wait` sends when there is room. What was sent and has
    failed would fail again, and again."""
    never = [c.cell for c in state.cells if (c.state, c.job, c.cause) == ("missing", "", "")]
    return state.held + [cell for cell in never if state.fits(cell)]
