"""Read one rank's share of the counts files into arrays over the cells of each data set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.shards.manifest import Manifest
from hpc.storage.atomic import Damaged
from jobs.metrics.counts import Int64, shapes
from jobs.spec.counts_file import CountsIndex, read_counts
from pipeline.config.grid_file import Grid


@dataclass(frozen=True)
class Share:
    """The counts of one data set that one rank has read.

    `counts` are the arrays of `Counts` with a leading axis of cells. `signatures` are the cells
    that were read, `rows` their positions among the data set's cells in grid order. In a whole
    share the axis has all cells of the data set, and rows of other ranks are undefined. Otherwise
    it has the cells of `signatures` in their order.
    """

    dataset: str
    counts: Mapping[str, Int64]
    signatures: list[str]
    rows: NDArray[np.intp]


def files_of(chosen: Mapping[str, CountsIndex]) -> list[CountsIndex]:
    """Return the counts files of the cells, each once, sorted by name."""
    return sorted({id(i): i for i in chosen.values()}.values(), key=lambda index: index.path.name)


def read_shares(
    grid: Grid,
    indices: Sequence[CountsIndex],
    chosen: Mapping[str, CountsIndex],
    problems: list[str],
    whole: bool,
) -> Iterator[Share]:
    """Read each of `indices` once and yield a share for each data set, in the grid's order.

    A share is valid until the next one is requested, which reuses its memory: new memory for each
    would take longer than reading, and a rank need not hold all shares.

    Args:
        grid: the grid.
        indices: the counts files of this rank. Each holds at least one chosen cell, and all its
            chosen cells belong to one data set.
        chosen: the counts file to use for each cell, by signature. A cell can lie in several files.
        problems: gets a line for each damaged file.
        whole: True for arrays over all cells of a data set; see `Share`.
    """
    rows = _rows_of(grid)
    files: dict[str, list[tuple[CountsIndex, list[int]]]] = {name: [] for name in rows}
    for index in indices:
        mine = [k for k, owner in enumerate(map(chosen.get, index.signatures)) if owner is index]
        first = index.signatures[mine[0]]
        files[next(name for name in rows if first in rows[name])].append((index, mine))
    of_cell = {name: _shapes(grid, name) for name in rows}
    cells = {n: len(rows[n]) if whole else sum(len(mine) for _, mine in files[n]) for n in rows}
    memory = np.empty(max(cells[name] * _numbers(of_cell[name]) for name in rows), np.int64)
    buffer = bytearray(max((index.size for index in indices), default=0))
    for name, row_of in rows.items():
        counts = _views(memory, cells[name], of_cell[name])
        found = _read(counts, files[name], row_of if whole else None, buffer, problems)
        places = np.fromiter((row_of[signature] for signature in found), np.intp, len(found))
        yield Share(name, counts, found, places)


def _read(
    counts: Mapping[str, Int64],
    files: Sequence[tuple[CountsIndex, list[int]]],
    row_of: Mapping[str, int] | None,
    buffer: bytearray,
    problems: list[str],
) -> list[str]:
    """Copy the chosen cells of `files` into `counts`; return the signatures of the cells read.

    `files` gives the positions of the chosen cells in each file. `row_of` gives their rows in
    `counts`; None means one after the other.
    """
    found: list[str] = []
    for index, mine in files:
        try:
            stacked = read_counts(index, buffer)
            _check_shapes(counts, index, stacked)
        except Damaged as error:
            problems.append(str(error))
            continue
        signatures = [index.signatures[k] for k in mine]
        rows = (
            slice(len(found), len(found) + len(mine)) if row_of is None
            else np.array([row_of[signature] for signature in signatures], np.intp)
        )  # fmt: skip
        for key, array in counts.items():
            array[rows] = stacked[key] if len(mine) == len(index.signatures) else stacked[key][mine]
        found += signatures
    return found


def _rows_of(grid: Grid) -> dict[str, dict[str, int]]:
    """Return the row of each cell in its data set, by data set and signature."""
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
        found, shape = stacked.get(name), (len(index.signatures), *array.shape[1:])
        if found is None or found.dtype != np.int64 or found.shape != shape:
            what = "missing" if found is None else f"{found.dtype} {found.shape}"
            raise Damaged(
                f"{index.path} has other counts than this grid needs: {name} is {what}, not int64 "
                f"{shape}; delete it and run grid again"
            )


def _shapes(grid: Grid, dataset: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one cell's counts on a data set."""
    manifest = Manifest.load(grid.datasets[dataset].shards)
    return shapes(len(manifest.classes), grid.protocols[dataset].bins)


def _numbers(of_cell: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, of_cell.values()))


def _views(memory: Int64, cells: int, of_cell: Mapping[str, tuple[int, ...]]) -> dict[str, Int64]:
    """Return arrays of `cells` cells by name, one after the other in `memory`."""
    ends = np.cumsum([cells * math.prod(shape) for shape in of_cell.values()])
    parts = np.split(memory[: ends[-1]], ends[:-1])
    return {
        name: part.reshape(cells, *shape)
        for part, (name, shape) in zip(parts, of_cell.items(), strict=True)
    }
