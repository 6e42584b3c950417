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


def files_of(chosen: Mapping[str, CountsIndex]) -> list[CountsIndex]:
    """The counts files of cells, each once, in order of their names."""
    return sorted({id(i): i for i in chosen.values()}.values(), key=lambda index: index.path.name)


def read_share(
    grid: Grid,
    indices: Sequence[CountsIndex],
    chosen: Mapping[str, CountsIndex],
    problems: list[str],
) -> Share:
    """Read the counts files of `indices`, each once; a damaged one becomes a line in `problems`. A
    cell that lies in several files counts once, from the one `chosen` for it by signature."""
    rows = _rows_of(grid)
    share = Share({name: _no_counts(grid, name, len(rows[name])) for name in rows}, set())
    buffer = bytearray(max((index.size for index in indices), default=0))
    for index in indices:
        signatures = [cell["signature"] for cell in index.cells]
        here = [name for name in rows if not rows[name].keys().isdisjoint(signatures)]
        try:
            stacked = read_counts(index, buffer)
            for name in here:
                _check_shapes(share.counts[name], index, stacked)
        except Damaged as error:
            problems.append(str(error))
            continue
        mine = [(k, s) for k, s in enumerate(signatures) if chosen.get(s) is index]
        for name in here:
            places = [(k, rows[name][s]) for k, s in mine if s in rows[name]]
            _copy(stacked, places, len(signatures), share.counts[name])
        share.signatures.update(s for _, s in mine)
    return share


def _rows_of(grid: Grid) -> dict[str, dict[str, int]]:
    """The row of each cell of each data set by signature: grid order."""
    rows: dict[str, dict[str, int]] = {name: {} for name in grid.datasets}
    for cell in grid.cells:
        of_dataset = rows[cell.dataset]
        of_dataset[cell.signature] = len(of_dataset)
    return rows


def _copy(
    stacked: Mapping[str, Int64],
    places: list[tuple[int, int]],
    number: int,
    counts: Mapping[str, Int64],
) -> None:
    """Put cells of a file of `number` cells where they belong, all at once. places: where in the
    file, and in which row of `counts`."""
    positions, rows = np.array(places, np.intp).reshape(-1, 2).T
    for key, whole in counts.items():
        whole[rows] = stacked[key] if len(rows) == number else stacked[key][positions]


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
