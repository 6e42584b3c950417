"""The counts of all cells of one job: one HDF5 file, never modified, and its index in JSON. A cell
is done when an index names it and the file it points to verifies."""

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

ASIDE = ".json-damaged"  # the index of a file that is not to count any more


@dataclass(frozen=True)
class CountsIndex:
    """What one counts file holds. `columns` are the `signature`, `name` and more of its cells, in
    the order of the arrays' first axis: a list each, for there are thousands of cells to read."""

    path: Path
    sha256: str
    crc32: int  # forty times as fast as `sha256`
    size: int
    columns: Mapping[str, Sequence[Any]]
    record: Mapping[str, Any]
    arrays: Mapping[str, tuple[int, str, list[int]]]  # where each lies: offset, type, shape

    @property
    def signatures(self) -> Sequence[str]:
        """Of its cells."""
        return self.columns["signature"]

    def of_cell(self, signature: str) -> dict[str, Any]:
        """What it says of one of its cells."""
        place = self._places[signature]
        return {key: column[place] for key, column in self.columns.items()}

    @cached_property
    def _places(self) -> dict[str, int]:
        return {signature: place for place, signature in enumerate(self.signatures)}

    def is_whole(self) -> bool:
        """Whether the file is there with its full length: cheap, for planning and status."""
        try:
            return self.path.stat().st_size == self.size
        except OSError:
            return False

    def is_altered(self) -> bool:
        """Whether it has its full length but another content. Reads all of it."""
        try:
            return self.is_whole() and file_sha256(self.path) != self.sha256
        except OSError:  # it may be another time
            return False

    def read(self, buffer: bytearray | None = None) -> memoryview:
        """All of it, in `buffer` where there is one: new memory for every file takes longer than
        reading it. Raises `Damaged`."""
        try:
            data = memoryview(self._bytes(buffer) if self.is_whole() else b"")
        except OSError as error:
            raise Damaged(f"{self.path} cannot be read: {error.strerror}") from error
        if crc32(data) != self.crc32:
            raise Damaged(
                f"{self.path} is damaged (its checksum does not fit); delete it and run grid again"
            )
        return data

    def _bytes(self, buffer: bytearray | None) -> bytes | memoryview:
        if buffer is None:
            return self.path.read_bytes()
        with self.path.open("rb") as file:
            return memoryview(buffer)[: file.readinto(buffer)]


def write_counts(
    path: Path, cells: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any],
    record: Mapping[str, Any], check: Check | None = None,
) -> None:  # fmt: skip
    """Write the arrays, whose first axis is `cells`, records of the same keys with a `signature`,
    and then the index that makes them count; neither appears if `check` raises."""
    import h5py  # planning reads indices and must not pay for it

    whole = BytesIO()  # a disk that gets full while HDF5 writes crashes the process
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
    """The index of a counts file from its JSON. Raises `Damaged`, and `FileNotFoundError` where
    there is none."""
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
    """Return `columns`. Raises `ValueError` if they are not lists of one length."""
    expected = (list, len(columns["signature"]))
    if any((type(column), len(column)) != expected for column in columns.values()):
        raise ValueError("not lists of one length")
    return columns


def set_aside_altered(folder: Path) -> list[str]:
    """Rename the indices in `folder` whose files were altered, so that their cells count as missing
    for everybody; the files themselves stay. A line for each. Raises `UserError`."""
    lines = []
    for index in map(_index_or_none, sorted(folder.glob("*.json"))):
        if index is not None and index.is_altered():
            path = index.path.with_suffix(".json")
            rename_file(path, path.with_suffix(ASIDE))
            lines.append(
                f"{index.path} is damaged (its checksum does not fit); its cells are trained anew, "
                f"its index is {path.with_suffix(ASIDE).name} now"
            )
    return lines


def _index_or_none(path: Path) -> CountsIndex | None:
    try:
        return read_index(path)
    except (Damaged, FileNotFoundError):
        return None


def counted_cells(folder: Path) -> set[str]:
    """The signatures of the cells that whole counts files in `folder` hold. What cannot be read
    holds none, so that its cells are trained again."""
    found: set[str] = set()
    for index in map(_index_or_none, folder.glob("*.json")):
        if index is not None and index.is_whole():
            found.update(index.signatures)
    return found


def read_counts(index: CountsIndex, buffer: bytearray | None = None) -> dict[str, Any]:
    """The arrays of a counts file by name, as they were written; with a `buffer`, which has room
    for the file, they lie in it. Raises `Damaged`."""
    import numpy as np

    data = index.read(buffer)
    try:
        return {
            name: np.frombuffer(data, kind, math.prod(shape), offset).reshape(shape)
            for name, (offset, kind, shape) in index.arrays.items()
        }
    except (TypeError, ValueError) as error:
        raise _damaged(index.path, "is not as its index says") from error


def _place(stored: Any) -> tuple[int, str, list[int]]:
    """Where HDF5 has put an array in its file, as one run of bytes: thousands of files are read at
    a tenth of what it takes to open them as HDF5."""
    return stored.id.get_offset() or 0, stored.dtype.str, list(stored.shape)


def _damaged(path: Path, what: str) -> Damaged:
    return Damaged(f"{path} {what}; delete it and run grid again")
