"""The counts of all cells of one job: one HDF5 file, never modified, and its index in JSON. A cell
is done when an index names it and the file it points to verifies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from hpc.atomic import Damaged, file_sha256, read_json, write_bytes, write_json


@dataclass(frozen=True)
class CountsIndex:
    """What one counts file holds. `cells` are records with `signature`, `name` and more, in the
    order of the arrays' first axis."""

    path: Path
    sha256: str
    size: int
    cells: tuple[Mapping[str, Any], ...]
    record: Mapping[str, Any]

    def is_whole(self) -> bool:
        """Whether the file is there with its full length: cheap, for planning and status."""
        try:
            return self.path.stat().st_size == self.size
        except FileNotFoundError:
            return False

    def verify(self) -> None:
        """Read all of it. Raises `Damaged`."""
        if not self.is_whole() or file_sha256(self.path) != self.sha256:
            raise Damaged(
                f"{self.path} is damaged (its checksum does not fit); delete it and run grid again"
            )


def write_counts(
    path: Path, cells: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any],
    record: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the arrays, whose first axis is `cells`, and then the index that makes them count."""
    import h5py  # planning reads indices and must not pay for it

    whole = BytesIO()  # a disk that gets full while HDF5 writes crashes the process
    with h5py.File(whole, "w", track_order=False) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, track_times=False)
    write_bytes(path, whole.getvalue())
    index = {"sha256": file_sha256(path), "bytes": path.stat().st_size, "cells": list(cells)}
    write_json(path.with_suffix(".json"), {**index, "record": dict(record)})


def read_index(path: Path) -> CountsIndex:
    """The index of a counts file from its JSON. Raises `Damaged`."""
    index = read_json(path)
    return CountsIndex(
        path=path.with_suffix(".h5"),
        sha256=index["sha256"],
        size=index["bytes"],
        cells=tuple(index["cells"]),
        record=index["record"],
    )


def read_counts(index: CountsIndex) -> dict[str, Any]:
    """The arrays of a counts file, verified. Raises `Damaged`."""
    import h5py

    index.verify()
    with h5py.File(index.path, "r") as file:
        return {name: file[name][...] for name in file}
