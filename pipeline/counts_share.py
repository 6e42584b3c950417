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
    signatures: list[str]


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
    cell that lies in several files counts once, from the one `chosen` for it by signature. Of every
    file some cells are chosen, all of one data set: that of its job."""
    row_of = _rows_of(grid)
    share = Share({name: _no_counts(grid, name, len(row_of[name])) for name in row_of}, [])
    buffer = bytearray(max((index.size for index in indices), default=0))
    for index in indices:
        mine = [k for k, owner in enumerate(map(chosen.get, index.signatures)) if owner is index]
        signatures = [index.signatures[k] for k in mine]
        name = next(name for name in row_of if signatures[0] in row_of[name])  # a job has but one
        try:
            stacked = read_counts(index, buffer)
            _check_shapes(share.counts[name], index, stacked)
        except Damaged as error:
            problems.append(str(error))
            continue
        rows = np.array([row_of[name][signature] for signature in signatures], np.intp)
        for key, whole in share.counts[name].items():
            whole[rows] = stacked[key] if len(mine) == len(index.cells) else stacked[key][mine]
        share.signatures.extend(signatures)
    return share


def _rows_of(grid: Grid) -> dict[str, dict[str, int]]:
    """The row of each cell of each data set by signature: grid order."""
    rows: dict[str, dict[str, int]] = {name: {} for name in grid.datasets}
    for cell in grid.cells:
        of_dataset = rows[cell.dataset]
        of_dataset[cell.signature] = len(of_dataset)
    return rows


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
