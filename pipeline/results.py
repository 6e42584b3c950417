"""The format of `results.h5`: the counts of every finished cell of a grid, and what is needed to
read them. One reader, one writer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc.atomic import Damaged, write_bytes
from hpc.command import UserError
from jobs.metrics.counts import NAMES, Counts, shapes

FORMAT = 1
CELL_KEYS = ("signature", "name", "model", "loss", "seed", "notes", "backbone")

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class DatasetResults:
    """The finished cells of one data set, in grid order.

    `train_class_pixels` and `val_class_pixels` are labelled pixels of each class, [C]. A cell is a
    record with the keys `CELL_KEYS`. `counts` are the arrays of `Counts` by name, each with one
    more leading axis: the cells.
    """

    name: str
    classes: list[str]
    train_class_pixels: Int64
    val_class_pixels: Int64
    cells: list[dict[str, Any]]
    counts: dict[str, Int64]

    def counts_of(self, index: int) -> Counts:
        """The counts of the cell `cells[index]`."""
        return Counts.from_arrays({name: self.counts[name][index] for name in NAMES})


@dataclass(frozen=True)
class Results:
    """A whole `results.h5`. `record` is JSON: what cannot be told from the counts. The report shows
    these of its keys, where present: `missing` (names of cells without counts), `notes` (lines),
    `protocol` (a table), `commit`, and `losses`, a list in grid order of {name, terms: [names],
    schedule: [{at, weights, ramp}]}."""

    grid: str
    record: dict[str, Any]
    datasets: list[DatasetResults]


def write_results(path: str | Path, results: Results) -> None:
    """Write `results.h5` in one step; equal results give equal bytes.

    Raises `ValueError` if arrays and cells do not fit together.
    """
    for dataset in results.datasets:
        _check(dataset)
    whole = BytesIO()  # a disk that gets full while HDF5 writes crashes the process
    with h5py.File(whole, "w", libver=("v110", "v110")) as file:
        file.attrs["format"] = FORMAT
        file.attrs["grid"] = results.grid
        file.attrs["record"] = _json(results.record)
        file.attrs["sha256"] = _checksum(results)
        for index, dataset in enumerate(results.datasets):
            _write_dataset(file.create_group(str(index)), dataset)
    write_bytes(path, whole.getvalue())


def read_results(path: str | Path) -> Results:
    """The results that `write_results` wrote.

    Raises `UserError` if there are none or they are of another version, and `Damaged` if they are
    not as they were written.
    """
    if not Path(path).exists():
        raise UserError(f"there are no results at {path}; run `reduce` first")
    try:
        with h5py.File(path, "r") as file:
            _check_format(path, file)
            groups = [file[str(index)] for index in range(len(file))]
            results = Results(
                str(file.attrs["grid"]),
                json.loads(file.attrs["record"]),
                [_read_dataset(group) for group in groups],
            )
            intact = file.attrs["sha256"] == _checksum(results)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(path) from error
    if not intact:
        raise _damaged(path)
    return results


def _check_format(path: str | Path, file: h5py.File) -> None:
    if file.attrs["format"] != FORMAT:
        raise UserError(
            f"{path} has format {file.attrs['format']}, this version reads {FORMAT}; "
            "run `reduce` again"
        )


def _damaged(path: str | Path) -> Damaged:
    return Damaged(f"{path} is damaged (its checksum does not fit); run `reduce` again")


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
    # times would make the bytes of equal results differ
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


def _checksum(results: Results) -> str:
    digest = hashlib.sha256(_json([FORMAT, results.grid, results.record]).encode())
    for part in _parts(results):
        digest.update(len(part).to_bytes(8, "little"))  # so that no byte can change its array
        digest.update(part)
    return digest.hexdigest()


def _parts(results: Results) -> Iterator[bytes]:
    for dataset in results.datasets:
        yield _json([dataset.name, dataset.classes, dataset.cells]).encode()
        arrays = [dataset.counts[name] for name in NAMES]
        for array in (dataset.train_class_pixels, dataset.val_class_pixels, *arrays):
            yield np.ascontiguousarray(array, dtype="<i8").tobytes()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
