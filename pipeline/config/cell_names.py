"""Find the cells that the user names on a command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from hpc.cli import UserError
from hpc.config import shown
from jobs.spec.cell import Cell
from pipeline.config.grid_file import Grid

_MOST_NAMED = 5


def cells_named(grid: Grid, names: Sequence[str]) -> list[Cell]:
    """Return the cells of `names`, each once; names are as status prints them.

    Raises `UserError` with the nearest names for an unknown name.
    """
    known = {cell.name: cell for cell in grid.cells}
    for name in names:
        if name not in known:
            raise UserError(f"{grid.path} has no cell {shown(name)}; {nearest(grid, name, known)}")
    return [known[name] for name in dict.fromkeys(names)]


def one_named(grid: Grid, name: str, others: Sequence[str] = ()) -> Cell | str:
    """Return the one cell, or the one of `others`, with this name or a unique part of it.

    Raises `UserError` if no name or several names match.
    """
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
    """Return the end of an error message: the names nearest to `name`, or where to find all."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"see `python -m pipeline.status {grid.command_arguments}`"
