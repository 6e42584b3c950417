"""Write one shard (the format: `format.py`). Equal samples give equal bytes.

HDF5 lays the file out and writes the index. The arenas are then written as plain bytes: on a full
disk HDF5 crashes instead of reporting an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep.shards.format import BAND_ROWS, Entry, RowLayout, frame_sha256, index_table
from hpc.storage.checksum import crc32

# superblock and object headers of one fixed version, whatever the installed HDF5 prefers
_LIBVER = ("v110", "v110")
_METADATA_BYTES = 1_000_000  # an upper bound of HDF5's own structures

Bytes = NDArray[np.uint8]


class ShardWriter:
    """A context manager that writes one shard.

    `add` takes the samples in the order of `entries`. `frame_sha256` is set when the block has
    ended. A full disk raises `OSError`.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._entries = list(entries)
        self._table = index_table(self._entries)
        self._crcs: dict[str, list[int]] = {"pixels": [], "labels": []}
        self._added = 0
        self.frame_sha256 = ""
        self._path = path
        _check_room(path, self._table.nbytes + _METADATA_BYTES)
        self._begin = _lay_out(path, self._entries, self._table)
        self._descriptor = os.open(path, os.O_WRONLY)

    @property
    def arenas(self) -> tuple[tuple[int, int], ...]:
        """Return the places of pixels and labels in the file: (offset, bytes) each."""
        sizes = {
            "pixels": sum(entry.pixels.size for entry in self._entries),
            "labels": sum(entry.labels.size for entry in self._entries),
        }
        return tuple((self._begin[arena], size) for arena, size in sizes.items())

    def add(self, pixels: Bytes, label: Bytes) -> None:
        """Append the next entry's sample.

        Args:
            pixels: uint8 [H, W, 3], or the bytes [N] of a JPEG file.
            label: uint8 [H, W].
        """
        entry = self._entries[self._added]
        self._append("pixels", pixels, entry.pixels)
        self._append("labels", label, entry.labels)
        self._added += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._descriptor)

    def _append(self, arena: str, data: Bytes, layout: RowLayout) -> None:
        assert data.size == layout.size
        lines = np.ascontiguousarray(data).reshape(layout)
        offset = self._begin[arena] + int(self._table[self._added][f"{arena}_offset"])
        _write(self._descriptor, lines.data.cast("B"), offset)
        starts = range(0, layout.rows, BAND_ROWS)
        self._crcs[arena].extend(crc32(lines[row : row + BAND_ROWS].data) for row in starts)

    def _finish(self) -> None:
        assert self._added == len(self._entries), "every entry needs its sample"
        crcs = {arena: np.array(found, "<u4") for arena, found in self._crcs.items()}
        for arena, found in crcs.items():
            _write(self._descriptor, memoryview(found.tobytes()), self._begin[f"{arena}_crc"])
        self.frame_sha256 = frame_sha256(self._path, self.arenas)


def _lay_out(path: Path, entries: list[Entry], table: NDArray[np.void]) -> dict[str, int]:
    """Make the file with its index, allocate the rest, and return each dataset's offset."""
    shapes = {
        "pixels": (sum(e.pixels.size for e in entries), "u1"),
        "labels": (sum(e.labels.size for e in entries), "u1"),
        "pixels_crc": (sum(e.pixels.num_bands for e in entries), "<u4"),
        "labels_crc": (sum(e.labels.num_bands for e in entries), "<u4"),
    }
    allocated = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    allocated.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    allocated.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w", libver=_LIBVER, locking=False) as file:
        file.create_dataset("index", data=table, track_times=False)
        for name, (length, kind) in shapes.items():
            file.create_dataset(name, (length,), kind, dcpl=allocated, track_times=False)
        return {name: file[name].id.get_offset() for name in shapes}


def _check_room(path: Path, size: int) -> None:
    # write as many bytes as HDF5 will: unlike HDF5, this raises an error on a full disk
    with path.open("wb") as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
