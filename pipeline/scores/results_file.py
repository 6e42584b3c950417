"""Write and read `results.h5`: the counts of every finished cell of a grid, and their metadata.

The file begins with an HDF5 user block of 512 bytes: `lossgrid results 2` and the SHA-256 of all
following bytes. It is compared before HDF5 reads a byte, because damaged structures can hang the
library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc.cli import UserError
from hpc.storage.atomic import Damaged, write_bytes
from jobs.metrics.counts import NAMES, Counts, shapes

_KIND = b"lossgrid results "
_FORMAT = _KIND + b"2\n"
_USER_BLOCK = 512  # bytes, the smallest size that HDF5 allows
CELL_KEYS = ("signature", "name", "model", "loss", "seed", "notes", "backbone")

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class DatasetResults:
    """The finished cells of one data set, in grid order.

    `train_class_pixels` and `val_class_pixels` [C] are the labelled pixels of each class. A cell is
    a record with the keys `CELL_KEYS`. `counts` are the arrays of `Counts` by name with an
    additional leading axis of cells.
    """

    name: str
    classes: list[str]
    train_class_pixels: Int64
    val_class_pixels: Int64
    cells: list[dict[str, Any]]
    counts: dict[str, Int64]

    def counts_of(self, index: int) -> Counts:
        """Return the counts of the cell `cells[index]`."""
        return Counts.from_arrays({name: self.counts[name][index] for name in NAMES})


@dataclass(frozen=True)
class Results:
    """The content of `results.h5`.

    `record` holds JSON values beside the counts. The report shows these keys if present: `missing`
    (names of cells without counts), `notes` (lines), `protocol` (a table), `commit`, and `losses`.
    `losses` is a list in grid order of {name, terms: [names], schedule: [{at, weights, ramp}],
    datasets: [names]}. A loss has an entry for each of its schedules, which can differ between data
    sets.
    """

    grid: str
    record: dict[str, Any]
    datasets: list[DatasetResults]


class ResultsFile:
    """Writer of a `results.h5`, data set by data set, so that one of them is in memory at a time.

    Equal results give equal bytes.
    """

    def __init__(self, grid: str) -> None:
        self._whole = BytesIO()  # HDF5 crashes the process if the disk is full
        self._file = h5py.File(
            self._whole, "w", libver=("v110", "v110"), userblock_size=_USER_BLOCK
        )
        self._file.attrs["grid"] = grid

    def add(self, dataset: DatasetResults) -> None:
        """Add the next data set. Raises `ValueError` if its arrays and cells do not match."""
        _check(dataset)
        _write_dataset(self._file.create_group(str(len(self._file))), dataset)

    def write(self, path: str | Path, record: dict[str, Any]) -> None:
        """Write the file in one step; afterwards nothing can be added."""
        self._file.attrs["record"] = _json(record)
        self._file.close()
        content = self._whole.getbuffer()
        content[:_USER_BLOCK] = _user_block(content[_USER_BLOCK:])
        write_bytes(path, content)


def read_results(path: str | Path) -> Results:
    """Return the results that `ResultsFile` wrote.

    Raises `UserError` if the file is missing or of another version, and `Damaged` if its checksum
    does not match.
    """
    with _opened(path) as file:
        return Results(
            str(file.attrs["grid"]),
            json.loads(file.attrs["record"]),
            [_read_dataset(file[str(index)]) for index in range(len(file))],
        )


def num_cells(path: str | Path) -> int:
    """Return the number of cells in the results at `path`; 0 if they cannot be read."""
    try:
        with _opened(path) as file:
            return sum(len(file[name]["cells"]) for name in file)
    except UserError:
        return 0


def refuse_fewer(path: str | Path, had: int, have: int, why: str = "") -> None:
    """Refuse to replace a file of `had` finished cells by one of `have`, if these are fewer.

    Raises `UserError`, whose message ends with the reason `why` if it is known.
    """
    if have < had:
        raise UserError(
            f"{path} has {had} finished cells, but would now have {have}, so it was left as it is; "
            "undo the change of the grid file, train what is missing, or replace it with "
            f"--allow-fewer{why and f' ({why})'}"
        )


@contextmanager
def _opened(path: str | Path) -> Iterator[h5py.File]:
    try:
        whole = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there are no results at {path}; run `reduce` first") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; run `reduce` again") from error
    if whole.startswith(_KIND) and not whole.startswith(_FORMAT):
        raise UserError(
            f"{path} was written by another version of this program; run `reduce` again"
        )
    if whole[:_USER_BLOCK] != _user_block(whole[_USER_BLOCK:]):
        raise _damaged(path)
    with h5py.File(BytesIO(whole), "r") as file:
        yield file


def _user_block(content: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(content).hexdigest().encode()
    return (_FORMAT + digest + b"\n").ljust(_USER_BLOCK, b"\0")


def _damaged(path: str | Path) -> Damaged:
    return Damaged(f"{path} is damaged (its checksum differs); run `reduce` again")


def _check(dataset: DatasetResults) -> None:
    bins = dataset.counts["top1_bins"].shape[1]
    num_classes, num_cells = len(dataset.classes), len(dataset.cells)
    for name, shape in shapes(num_classes, bins).items():
        array = dataset.counts[name]
        if array.shape != (num_cells, *shape) or array.dtype != np.int64:
            raise ValueError(
                f"{dataset.name}: {name} of {num_cells} cells is {array.dtype} {array.shape}, "
                f"should be int64 {(num_cells, *shape)}"
            )
    for array in (dataset.train_class_pixels, dataset.val_class_pixels):
        if array.shape != (num_classes,):
            raise ValueError(f"{dataset.name}: one number a class, not {array.shape}")
    for cell in dataset.cells:
        if set(cell) != set(CELL_KEYS):
            raise ValueError(f"{dataset.name}: a cell has {CELL_KEYS}, not {tuple(cell)}")


def _write_dataset(group: h5py.Group, dataset: DatasetResults) -> None:
    group.attrs["dataset"] = dataset.name
    group.attrs["classes"] = _json(dataset.classes)
    group.attrs["train_class_pixels"] = np.asarray(dataset.train_class_pixels, np.int64)
    group.attrs["val_class_pixels"] = np.asarray(dataset.val_class_pixels, np.int64)
    cells = [_json(cell) for cell in dataset.cells]
    # without times, so that equal results give equal bytes
    group.create_dataset("cells", data=cells, dtype=h5py.string_dtype(), track_times=False)
    for name in NAMES:
        group.create_dataset(name, data=dataset.counts[name], track_times=False)


def _read_dataset(group: h5py.Group) -> DatasetResults:
    return DatasetResults(
        name=str(group.attrs["dataset"]),
        classes=json.loads(group.attrs["classes"]),
        train_class_pixels=group.attrs["train_class_pixels"],
        val_class_pixels=group.attrs["val_class_pixels"],
        cells=[json.loads(cell) for cell in group["cells"].asstr()[()]],
        counts={name: group[name][()] for name in NAMES},
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
