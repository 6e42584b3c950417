"""What one rank of a reduction reads: counts as arrays over the cells of each data set."""

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
    """What one rank has read of one data set: the arrays of `Counts`, the `signatures` of the cells
    it has, and which of the data set's cells they are, in grid order. The arrays' first axis is all
    cells of the data set if the share is `whole`, whatever stands where they are another's; else
    those that the rank has, in the order of `signatures`."""

    dataset: str
    counts: Mapping[str, Int64]
    signatures: list[str]
    rows: NDArray[np.intp]


def files_of(chosen: Mapping[str, CountsIndex]) -> list[CountsIndex]:
    """The counts files of cells, each once, in order of their names."""
    return sorted({id(i): i for i in chosen.values()}.values(), key=lambda index: index.path.name)


def read_shares(
    grid: Grid,
    indices: Sequence[CountsIndex],
    chosen: Mapping[str, CountsIndex],
    problems: list[str],
    whole: bool,
) -> Iterator[Share]:
    """Read the counts files of `indices`, each once, one data set of the grid after the other; a
    damaged file becomes a line in `problems`. A cell that lies in several files counts once, from
    the one `chosen` for it by signature. Of every file some cells are chosen, all of one data set:
    that of its job.

    A share lies in the memory of the one before it, which ends with the next step: new memory for
    each takes longer than reading them, and a rank need not hold them all."""
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
    """Put the chosen cells of files, given by their positions there, into their rows of `counts`,
    or one behind the other. Returns the signatures of those read."""
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
        found, shape = stacked.get(name), (len(index.signatures), *array.shape[1:])
        if found is None or found.dtype != np.int64 or found.shape != shape:
            what = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise Damaged(
                f"{index.path} has other counts than this grid needs: {name} is {what}, should be "
                f"int64 {shape}; delete it and run grid again"
            )


def _shapes(grid: Grid, dataset: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a cell's counts on a data set."""
    manifest = Manifest.load(grid.datasets[dataset].shards)
    return shapes(len(manifest.classes), grid.protocols[dataset].bins)


def _numbers(of_cell: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers the counts of a cell are."""
    return sum(map(math.prod, of_cell.values()))


def _views(memory: Int64, cells: int, of_cell: Mapping[str, tuple[int, ...]]) -> dict[str, Int64]:
    """Arrays of so many cells side by side in `memory`, by name."""
    ends = np.cumsum([cells * math.prod(shape) for shape in of_cell.values()])
    parts = np.split(memory[: ends[-1]], ends[:-1])
    return {
        name: part.reshape(cells, *shape)
        for part, (name, shape) in zip(parts, of_cell.items(), strict=True)
    }
