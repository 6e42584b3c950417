"""Measure the reduction of 100,000 cells on one rank, from their files to arrays of each data set.

The peer has an HDF5 file for each cell, as scripts usually write them. Ours has a file and an index
for each job, here of 50 cells (the paper's bundles have 32). Only ours compares checksums.

    mpiexec -n 2 python -m benchmarks.reducing GRID     prints the seconds of three reductions
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from benchmarks.large_run import (
    CLASSES,
    LOSSES,
    MODELS,
    large_grid,
    simulated_counts,
    write_submission,
)
from benchmarks.measure import Result, Work, compare, copy_bandwidth
from data_prep.shards.manifest import Manifest
from hpc.distributed.mpi import World, world
from jobs.metrics.counts import NAMES, Int64
from jobs.spec.counts_file import CountsIndex, cell_record, write_counts
from pipeline.config.grid_file import Grid, read_grid
from pipeline.scores.counts_share import files_of, read_shares
from pipeline.tracking.finished import finished_cells, garbage_collection_paused

CELLS_PER_JOB = 50
_PER_SEED = len(CLASSES) * len(MODELS) * len(LOSSES)
_PEERS = 2000  # cells that the peer reads; each costs the same
_KINDS = 40  # different counts of each data set


def measure() -> list[Result]:
    """Compare seconds per cell, ours over 100,000 cells and the peer's over 2,000 of them."""
    with _finished_run(100) as (grid, chosen):
        files = sorted({index.path for index in chosen.values()})
        size = sum(path.stat().st_size for path in files)
        singles = _file_a_cell(grid)
        found = compare(
            "reducing 100,000 cells, per cell",
            lambda: _from_the_files(grid),
            {f"one file per cell ({_PEERS} of them)": (lambda: _add_up_singles(singles), 40.0)},
            rounds=5,
            limit=f"{size / 1e9:.2f} GB read once: {size / (copy_bandwidth() / 2):.2f} s in all",
            more={
                "cells": len(grid.cells),
                "files": len(files),
                "of ours without the indices, s": _seconds(partial(add_up, grid, chosen, World())),
            },
        )
        alone = statistics.median(_seconds(partial(_from_the_files, grid)) for _ in range(5))
        whole = _command(grid)
    per_cell = [
        type(one)(
            one.what, one.against,
            tuple(s / len(grid.cells) for s in one.ours), tuple(s / _PEERS for s in one.peers),
            one.target, one.limit,
            {**one.more, "all of ours, s": statistics.median(one.ours),
             "all of ours, the peer not in between, s": alone, "the whole command, s": whole},
        )
        for one in found
    ]  # fmt: skip
    return list(per_cell)


def reducing_growth() -> dict[tuple[int, int], tuple[float, ...]]:
    """Return the seconds of three reductions by (ranks, cells).

    They go from the files, whose indices every rank has read, to the arrays on rank 0.
    """
    found = {}
    mpiexec = Path(sys.executable).with_name("mpiexec")
    for seeds in (0.1, 1, 10, 100):
        with _finished_run(max(1, int(seeds)), few=seeds < 1) as (grid, _):
            for ranks in (1, 2, 4):
                command = [str(mpiexec), "-n", str(ranks), sys.executable]
                done = subprocess.run(
                    [*command, "-m", "benchmarks.reducing", str(grid.path)],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                found[ranks, len(grid.cells)] = tuple(map(float, done.stdout.split()))
    return found


@garbage_collection_paused()  # as `pipeline.reduce`
def _from_the_files(grid: Grid) -> int:
    return add_up(grid, finished_cells(grid.run)[0], World())


@garbage_collection_paused()
def add_up(grid: Grid, chosen: dict[str, CountsIndex], ranks: World) -> int:
    """Read the counts as `pipeline.reduce` does; return the number of cells that this rank read.

    `chosen` is the counts file of each cell by signature.
    """
    problems: list[str] = []
    mine = files_of(chosen)[ranks.rank :: ranks.size]
    cells = 0
    for share in read_shares(grid, mine, chosen, problems, whole=ranks.rank == 0):
        ranks.rows_to_root(share.counts.values(), share.rows)
        cells += len(share.signatures)
    assert not problems
    return cells


@contextmanager
def _finished_run(seeds: int, few: bool = False) -> Iterator[tuple[Grid, dict[str, CountsIndex]]]:
    with tempfile.TemporaryDirectory() as name:
        datasets, losses = (["streets"], LOSSES[:25]) if few else (tuple(CLASSES), LOSSES)
        grid = large_grid(Path(name), seeds, datasets, losses, CELLS_PER_JOB)
        _count_all(grid)
        yield grid, finished_cells(grid.run)[0]


def _count_all(grid: Grid) -> None:
    """Write the counts files of all tasks with the jobs' own writer."""
    manifests = {n: Manifest.load(settings.shards) for n, settings in grid.datasets.items()}
    kinds = {
        name: [
            simulated_counts(len(m.classes), grid.protocols[name].bins, k) for k in range(_KINDS)
        ]
        for name, m in manifests.items()
    }
    for task in write_submission(grid):
        name = task.cells[0].dataset
        some = [kinds[name][int(cell.signature, 16) % _KINDS].as_arrays() for cell in task.cells]
        entries = [cell_record(cell, "ab" * 32) for cell in task.cells]
        record = {"manifest": manifests[name].fingerprint, "provenance": [{}], "source": {}}
        arrays = {key: np.stack([counts[key] for counts in some]) for key in NAMES}
        write_counts(grid.run.counts_of(task.name, 1), entries, arrays, record)


def _file_a_cell(grid: Grid) -> list[Path]:
    """Write the counts of `_PEERS` cells, of all data sets alike, each to its own file."""
    folder = grid.run.root / "singles"
    folder.mkdir()
    paths = [folder / f"{number}.h5" for number in range(_PEERS)]
    for number, path in enumerate(paths):
        num_classes = list(CLASSES.values())[number * len(CLASSES) // _PEERS]
        counts = simulated_counts(num_classes, 10, number % _KINDS)
        with h5py.File(path, "w") as file:
            for name, array in counts.as_arrays().items():
                file.create_dataset(name, data=array)
    return paths


def _add_up_singles(paths: list[Path]) -> dict[tuple[int, str], Int64]:
    cells: dict[int, list[dict[str, Int64]]] = {}
    for path in paths:
        with h5py.File(path, "r") as file:
            counts = {name: file[name][()] for name in file}
        cells.setdefault(len(counts["confusion"]), []).append(counts)
    return {
        (classes, name): np.stack([cell[name] for cell in alike])
        for classes, alike in cells.items()
        for name in NAMES
    }


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _command(grid: Grid) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pipeline.reduce", str(grid.path)], check=True, capture_output=True
    )
    return time.perf_counter() - start


def main(path: str) -> None:
    """Print the seconds of three reductions between barriers."""
    grid, ranks = read_grid(path), world()
    chosen = finished_cells(grid.run)[0]
    for _ in range(3):
        ranks.barrier()
        start = time.perf_counter()
        add_up(grid, chosen, ranks)
        ranks.barrier()
        if ranks.rank == 0:
            print(time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1])
