"""Write and read a counts file: the evaluation counts of all cells of one job.

It is an HDF5 file that is never modified, with an index in JSON. A cell is done when an index names
it and the file of that index is intact. A job compares its length; a submission also its SHA-256.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from hpc.storage.atomic import (
    Check,
    Damaged,
    file_sha256,
    read_json,
    rename_file,
    write_bytes,
    write_json,
)
from hpc.storage.checksum import crc32
from jobs.spec.cell import Cell

ASIDE = ".json-damaged"  # suffix of the index of a damaged file, which no longer counts


@dataclass(frozen=True)
class CountsIndex:
    """The index of one counts file.

    `columns` holds one list for each key of a `cell_record`, in the order of the arrays' first
    axis: lists are fast to read for thousands of cells.
    """

    path: Path
    sha256: str
    crc32: int  # 40 times as fast as `sha256`
    size: int
    columns: Mapping[str, Sequence[Any]]
    record: Mapping[str, Any]
    arrays: Mapping[str, tuple[int, str, list[int]]]  # offset in bytes, dtype, shape

    @property
    def signatures(self) -> Sequence[str]:
        """Return the signatures of the cells in the file."""
        return self.columns["signature"]

    def of_cell(self, signature: str) -> dict[str, Any]:
        """Return the `cell_record` of one of its cells."""
        place = self._places[signature]
        return {key: column[place] for key, column in self.columns.items()}

    @cached_property
    def _places(self) -> dict[str, int]:
        return {signature: place for place, signature in enumerate(self.signatures)}

    def is_whole(self) -> bool:
        """Return True if the file exists with its full length; cheap, for planning and status."""
        try:
            return self.path.stat().st_size == self.size
        except OSError:
            return False

    def is_altered(self) -> bool:
        """Return True if the file has its full length but another content; reads all of it."""
        try:
            return self.is_whole() and file_sha256(self.path) != self.sha256
        except OSError:  # a file that cannot be read now may be intact
            return False

    def read(self, buffer: bytearray | None = None) -> memoryview:
        """Return the content of the file. Raises `Damaged`.

        Args:
            buffer: memory with space for the file. New memory for every file takes longer than
                reading it.
        """
        if not self.is_whole():
            raise Damaged(
                f"{self.path} is missing or cut short; run grid again to train its cells anew"
            )
        try:
            data = memoryview(self._bytes(buffer))
        except OSError as error:
            raise Damaged(f"{self.path} cannot be read: {error.strerror}") from error
        if crc32(data) != self.crc32:
            raise Damaged(
                f"{self.path} is damaged (its checksum differs); delete it and run grid again"
            )
        return data

    def _bytes(self, buffer: bytearray | None) -> bytes | memoryview:
        if buffer is None:
            return self.path.read_bytes()
        with self.path.open("rb") as file:
            return memoryview(buffer)[: file.readinto(buffer)]


def cell_record(cell: Cell, backbone: str) -> dict[str, str]:
    """Return the entry of a cell in a counts file; `backbone` is the SHA-256 of its weights."""
    return {"signature": cell.signature, "name": cell.name, "backbone": backbone}


def write_counts(
    path: Path, cells: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any],
    record: Mapping[str, Any], check: Check | None = None,
) -> None:  # fmt: skip
    """Write a counts file and then its index, which makes its cells done.

    Args:
        path: the HDF5 file; the index is the same name with the suffix .json.
        cells: `cell_record` of each cell, in the order of the arrays' first axis.
        arrays: arrays by name, [cells, ...].
        record: plain values about the job.
        check: called before each file appears; no file appears if it raises.
    """
    import h5py  # planning reads only indices and must not load it

    whole = BytesIO()  # a full disk crashes the process while HDF5 writes a file
    with h5py.File(whole, "w", track_order=False) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, track_times=False)
        places = {name: _place(stored) for name, stored in file.items()}
    write_bytes(path, whole.getvalue(), check)
    columns = {key: [cell[key] for cell in cells] for key in cells[0]}
    index = {"sha256": file_sha256(path), "crc32": crc32(whole.getbuffer()),
             "bytes": path.stat().st_size, "cells": columns, "arrays": places}  # fmt: skip
    write_json(path.with_suffix(".json"), {**index, "record": dict(record)}, check)


def read_index(path: Path) -> CountsIndex:
    """Read the index of a counts file from `path`. Raises `Damaged` and `FileNotFoundError`."""
    index = read_json(path)
    try:
        found = CountsIndex(
            path=path.with_suffix(".h5"),
            sha256=index["sha256"],
            crc32=index["crc32"],
            size=index["bytes"],
            columns=_checked_columns(index["cells"]),
            record=dict(index["record"]),
            arrays=dict(index["arrays"]),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged(path, "is not an index of counts") from error
    if not set(map(type, found.signatures)) <= {str}:
        raise _damaged(path, "is not an index of counts")
    return found


def _checked_columns(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    expected = (list, len(columns["signature"]))
    if any((type(column), len(column)) != expected for column in columns.values()):
        raise ValueError("not lists of one length")
    return columns


def set_aside_altered(folder: Path) -> list[str]:
    """Rename the indices of altered files, so that their cells are trained again.

    The files themselves stay. Returns one line for each. Raises `UserError`.
    """
    lines = []
    for index in map(_index_or_none, sorted(folder.glob("*.json"))):
        if index is not None and index.is_altered():
            path = index.path.with_suffix(".json")
            rename_file(path, path.with_suffix(ASIDE))
            lines.append(
                f"{index.path} is damaged (its checksum differs); its cells are trained anew, "
                f"its index is {path.with_suffix(ASIDE).name} now"
            )
    return lines


def _index_or_none(path: Path) -> CountsIndex | None:
    try:
        return read_index(path)
    except (Damaged, FileNotFoundError):
        return None


def counted_cells(folder: Path) -> set[str]:
    """Return the signatures of the cells in whole counts files of `folder`.

    A file that cannot be read counts as empty, so that its cells are trained again.
    """
    found: set[str] = set()
    for index in map(_index_or_none, folder.glob("*.json")):
        if index is not None and index.is_whole():
            found.update(index.signatures)
    return found


def read_counts(index: CountsIndex, buffer: bytearray | None = None) -> dict[str, Any]:
    """Return the arrays of a counts file by name. Raises `Damaged`.

    With a `buffer` (see `CountsIndex.read`), the arrays are views of it.
    """
    import numpy as np

    data = index.read(buffer)
    try:
        return {
            name: np.frombuffer(data, kind, math.prod(shape), offset).reshape(shape)
            for name, (offset, kind, shape) in index.arrays.items()
        }
    except (TypeError, ValueError) as error:
        raise _damaged(index.path, "does not match its index") from error


def _place(stored: Any) -> tuple[int, str, list[int]]:
    """Return offset, dtype and shape of an array, which HDF5 stores as one run of bytes.

    Reading these bytes takes a tenth of the time of opening the file as HDF5.
    """
    return stored.id.get_offset() or 0, stored.dtype.str, list(stored.shape)


def _damaged(path: Path, what: str) -> Damaged:
    return Damaged(f"{path} {what}; delete it and run grid again")
