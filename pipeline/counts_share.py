"""What one rank of a reduction reads: counts as arrays over the cells of each data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.manifest import Manifest
from hpc.atomic import Damaged
from jobs.counts_file import CountsIndex, read_counts
from jobs.metrics.counts import Int64, shapes
from pipeline.grid import Grid


@dataclass(frozen=True)
class Share:
    """Counts that one rank has read: of each data set the arrays of `Counts`, whose first axis is
    its cells in grid order, 0 where they are another's; and the signatures of those it has."""

    counts: Mapping[str, Mapping[str, Int64]]
    signatures: set[str]


def read_share(
    grid: Grid,
    indices: Sequence[CountsIndex],
    chosen: Mapping[str, CountsIndex],
    problems: list[str],
) -> Share:
    """Read the counts files of `indices`, each once; a damaged one becomes a line in `problems`. A
    cell that lies in several files counts once, from the one `chosen` for it by signature."""
    cells = _cells_of(grid)
    share = Share({name: _no_counts(grid, name, len(cells[name])) for name in cells}, set())
    places = {s: (name, row) for name, those in cells.items() for row, s in enumerate(those)}
    for index in indices:
        try:
            stacked = read_counts(index)
            for name in {places[s][0] for s in _signatures(index) if s in places}:
                _check_shapes(share.counts[name], index, stacked)
        except Damaged as error:
            problems.append(str(error))
            continue
        mine = [(k, s) for k, s in enumerate(_signatures(index)) if chosen.get(s) is index]
        _copy(stacked, [(k, *places[s]) for k, s in mine], len(index.cells), share)
        share.signatures.update(s for _, s in mine)
    return share


def _cells_of(grid: Grid) -> dict[str, list[str]]:
    """The signatures of the cells of each data set, in grid order."""
    cells: dict[str, list[str]] = {name: [] for name in grid.datasets}
    for cell in grid.cells:
        cells[cell.dataset].append(cell.signature)
    return cells


def _copy(
    stacked: Mapping[str, Int64], places: list[tuple[int, str, int]], number: int, share: Share
) -> None:
    """Put cells of a file of `number` cells where they belong, those of a data set at once. places:
    where in the file, of which data set, and in which row there."""
    for name in {name for _, name, _ in places}:
        positions = [position for position, where, _ in places if where == name]
        rows = [row for _, where, row in places if where == name]
        for key, whole in share.counts[name].items():
            whole[rows] = stacked[key] if len(rows) == number else stacked[key][positions]


def _signatures(index: CountsIndex) -> list[str]:
    return [cell["signature"] for cell in index.cells]


def _check_shapes(
    wanted: Mapping[str, Int64], index: CountsIndex, stacked: Mapping[str, Int64]
) -> None:
    """Raise `Damaged` unless the arrays are the counts of the index's cells on this data set."""
    for name, array in wanted.items():
        found, shape = stacked.get(name), (len(index.cells), *array.shape[1:])
        if found is None or found.dtype != np.int64 or found.shape != shape:
            what = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise Damaged(
                f"{index.path} has other counts than this grid needs: {name} is {what}, should be "
                f"int64 {shape}; delete it and run grid again"
            )


def _no_counts(grid: Grid, dataset: str, number: int) -> dict[str, Int64]:
    """Room for the counts of `number` cells of a data set; takes none before it is written to."""
    manifest = Manifest.load(grid.datasets[dataset].shards)
    of_cell = shapes(len(manifest.classes), grid.protocols[dataset].bins)
    return {name: np.zeros((number, *shape), np.int64) for name, shape in of_cell.items()}
