"""Group the cells that are not done by why, so that one reason is told once. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from pipeline.tracking.survey import CellState

# numbers, and the hashes in the names of files and tasks
_NUMBER = re.compile(r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{8,}\b|[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?")


def by_reason(cells: Iterable[CellState]) -> list[list[CellState]]:
    """Return the cells grouped by state and reason, in the order of the first of each group.
    Reasons that differ only in the cell's own name or in numbers are one."""
    grouped: dict[tuple[str, str], list[CellState]] = {}
    for cell in cells:
        grouped.setdefault((cell.state, _pattern(cell)), []).append(cell)
    return list(grouped.values())


def _pattern(cell: CellState) -> str:
    own = cell.why.replace(cell.cell.name, "<cell>").replace(cell.cell.signature, "<cell>")
    return _NUMBER.sub("<number>", own)


def reason_lines(cells: Iterable[CellState], with_state: bool = True) -> Iterator[str]:
    """Yield a line for each reason: the cell, or how many cells and an example."""
    for group in by_reason(cells):
        first = group[0]
        words = " ".join(filter(None, [first.state if with_state else "", first.why]))
        if len(group) == 1:
            yield f"{first.cell.name}: {words}".rstrip()
        else:
            yield f"{len(group)} cells: {words}; for example {first.cell.name}"
