"""The cells that a person names on a command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from hpc.cli import UserError
from hpc.config import shown
from jobs.spec.cell import Cell
from pipeline.config.grid_file import Grid

_MOST_NAMED = 5


def cells_named(grid: Grid, names: Sequence[str]) -> list[Cell]:
    """The cells of these names, as status prints them, each once. Raises `UserError`, with the
    nearest names, for one that the grid has not."""
    known = {cell.name: cell for cell in grid.cells}
    for name in names:
        if name not in known:
            raise UserError(f"{grid.path} has no cell {shown(name)}; {nearest(grid, name, known)}")
    return [known[name] for name in dict.fromkeys(names)]


def one_named(grid: Grid, name: str, others: Sequence[str] = ()) -> Cell | str:
    """The one cell, or the one of `others`, that `name` means: by its whole name, or else by any
    part that no other has. Raises `UserError` where it is none or several."""
    known: dict[str, Cell | str] = {other: other for other in others}
    known |= {cell.name: cell for cell in grid.cells}
    if name in known:
        return known[name]
    matches = [full for full in known if name and name in full]
    if len(matches) == 1:
        return known[matches[0]]
    if matches:
        few = ", ".join(matches[:_MOST_NAMED]) + (", …" if len(matches) > _MOST_NAMED else "")
        raise UserError(f"{shown(name)} is part of {len(matches)} names: {few}; give more of one")
    raise UserError(f"{grid.path} has no cell {shown(name)}; {nearest(grid, name, list(known))}")


def nearest(grid: Grid, name: str, known: Sequence[str] | dict[str, Cell]) -> str:
    """The end of an error message: the names nearest to `name`, or where all are listed."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"see `python -m pipeline.status {grid.words}`"
