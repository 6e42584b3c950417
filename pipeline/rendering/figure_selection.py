"""What of a grid the page draws: every loss of every data set and model, as long as that is a page
that somebody reads; of larger grids some, beside an overview and files with the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.scores.paired_comparison import REFERENCE
from pipeline.scores.score_table import Row, blocks

MOST_ROWS = 150  # drawn one by one; the paper's whole grid has 102
MOST_BLOCKS = 6  # of a larger grid
MOST_LOSSES = 6  # of each of its blocks

Blocks = dict[tuple[str, str], list[Row]]


@dataclass(frozen=True)
class Selection:
    """The rows that are drawn by data set and model. `left_out` says which are not, "" if none."""

    drawn: Blocks
    left_out: str

    @property
    def losses(self) -> set[str]:
        """The names of all losses that are drawn somewhere."""
        return {row.loss for block in self.drawn.values() for row in block}


def select(table: Sequence[Row]) -> Selection:
    """All rows, or of more than `MOST_ROWS` for some data sets and models, one of each data set
    first, the reference and the losses with the best S_rec."""
    found = blocks(table)
    if len(table) <= MOST_ROWS:
        return Selection(found, "")
    firsts = {dataset: (dataset, model) for dataset, model in reversed(found)}
    order = [*reversed(firsts.values()), *(key for key in found if key not in firsts.values())]
    chosen = order[:MOST_BLOCKS]
    drawn = {key: _best(block) for key, block in found.items() if key in chosen}
    return Selection(
        drawn,
        f"Drawn are {len(drawn)} of {len(found)} data sets and models, and of each "
        f"{REFERENCE} and the losses with the best S_rec, {MOST_LOSSES} together; the same numbers "
        f"of all {len(table)} rows are in recall.csv, reliability.csv and confusion.csv.",
    )


def _best(block: Sequence[Row]) -> list[Row]:
    """In the order of the grid."""
    chosen = {row.loss for row in sorted(block, key=_rank)[:MOST_LOSSES]}
    return [row for row in block if row.loss in chosen]


def _rank(row: Row) -> tuple[bool, float]:
    mean = row.scores["s_rec"].mean
    return row.loss != REFERENCE, math.inf if math.isnan(mean) else -mean
