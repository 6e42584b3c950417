"""Read samples from shards, and check every byte against its CRC (the format: `format.py`).

HDF5 reads the index once. From then on a read is one `os.preadv` on the plain file. So a forked
loader process inherits no lock or state of the HDF5 library that could be broken.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep.images import BadFile, decode_rgb
from data_prep.shards.format import BAND_ROWS, Entry, RowLayout, frame_sha256, read_entry
from data_prep.shards.manifest import Manifest, ShardSummary, check_length, remedy
from hpc.storage.atomic import Damaged
from hpc.storage.checksum import crc32

Bytes = NDArray[np.uint8]

# Bytes to read at once, few enough to be still in the core's cache when their CRCs are computed.
_CHUNK_BYTES = 2**20


class ShardFile:
    """An open shard. Every read is checked against its CRCs."""

    def __init__(self, path: Path, summary: ShardSummary) -> None:
        """Open `path` and read its index.

        Raises:
            Damaged: the file is not the shard that `summary` describes.
        """
        self._descriptor = -1
        self._path = path
        check_length(path, summary.bytes)
        try:
            # HDF5 does not detect damage to its own structures
            if frame_sha256(path, summary.arenas) != summary.frame_sha256:
                raise ValueError(_frame_damage(summary))
            self._read_index(summary)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise Damaged(f"{path} is damaged ({error}); {remedy(path)}") from error

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def image(self, k: int, rows: tuple[int, int] | None = None) -> Bytes:
        """Return image `k` as uint8 [H, W, 3], or only its rows [first, stop)."""
        entry = self.entries[k]
        what = f"image {entry.id!r}"
        if entry.codec == "raw":
            data = self._pixels.read(self._descriptor, k, rows or (0, entry.height), what)
            return data.reshape(-1, entry.width, 3)
        data = self._pixels.read(self._descriptor, k, (0, 1), what)
        return self._decode(data, entry)[slice(*rows) if rows else slice(None)]

    def label(self, k: int, rows: tuple[int, int] | None = None) -> Bytes:
        """Return label map `k` as uint8 [H, W], or only its rows [first, stop)."""
        entry = self.entries[k]
        what = f"label map {entry.id!r}"
        data = self._labels.read(self._descriptor, k, rows or (0, entry.height), what)
        return data.reshape(-1, entry.width)

    def _read_index(self, summary: ShardSummary) -> None:
        with h5py.File(self._path, "r", locking=False) as file:
            table = file["index"][:]
            crcs = [file[name][:] for name in ("pixels_crc", "labels_crc")]
        begins = [offset for offset, _ in summary.arenas]
        self.entries = [read_entry(row) for row in table]
        self._pixels = _Arena(
            self._path, begins[0], table["pixels_offset"], [e.pixels for e in self.entries], crcs[0]
        )
        self._labels = _Arena(
            self._path, begins[1], table["labels_offset"], [e.labels for e in self.entries], crcs[1]
        )

    def _decode(self, data: Bytes, entry: Entry) -> Bytes:
        try:
            image = decode_rgb(data.tobytes(), f"{self._path}: image {entry.id!r}")
        except BadFile as error:
            raise Damaged(f"{error}; {remedy(self._path)}") from error
        if image.shape[:2] != (entry.height, entry.width):
            raise Damaged(f"{self._path}: image {entry.id!r} has another size than its index says")
        return image


class SplitReader:
    """The samples of one split by number, over all its shards, sorted by id.

    Each process opens a shard itself when it first needs it.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        self._folder = manifest.folder
        self._shards = manifest.splits[split].shards
        self._starts = list(accumulate((s.images for s in self._shards), initial=0))
        self._open: dict[int, ShardFile] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def id(self, i: int) -> str:
        """Return the id of sample `i`: the stem of its files in the source."""
        shard, k = self._place(i)
        return self._shards[shard].ids[k]

    def size(self, i: int) -> tuple[int, int]:
        """Return (height, width) of sample `i` in pixels. Opens no shard."""
        shard, k = self._place(i)
        return self._shards[shard].sizes[k]

    def image(self, i: int, rows: tuple[int, int] | None = None) -> Bytes:
        """Return image `i` as a new uint8 array [H, W, 3], RGB, or only its rows [first, stop).

        Raises:
            Damaged: the shard or the sample is damaged; the message names both.
        """
        shard, k = self._place(i)
        return self._file(shard).image(k, rows)

    def label(self, i: int, rows: tuple[int, int] | None = None) -> Bytes:
        """Return label map `i` as a new uint8 array [H, W], class index or VOID, or some rows.

        Args:
            i: number of the sample.
            rows: (first, stop) of the rows to return; None for all.

        Raises:
            Damaged: the shard or the sample is damaged; the message names both.
        """
        shard, k = self._place(i)
        return self._file(shard).label(k, rows)

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def _file(self, shard: int) -> ShardFile:
        if shard not in self._open:
            summary = self._shards[shard]
            self._open[shard] = ShardFile(self._folder / summary.file, summary)
        return self._open[shard]


class _Arena:
    """The places of all samples' bytes in the file, and the CRCs of their bands."""

    def __init__(
        self,
        path: Path,
        begin: int,
        offsets: NDArray[np.uint64],
        layouts: list[RowLayout],
        crcs: NDArray[np.uint32],
    ) -> None:
        self._path, self._layouts, self._crcs = path, layouts, crcs.tolist()
        self._begins = [begin + int(offset) for offset in offsets]
        self._first_crc = list(accumulate((one.num_bands for one in layouts), initial=0))

    def read(self, descriptor: int, k: int, rows: tuple[int, int], what: str) -> Bytes:
        """Return the bytes of the rows [first, stop) of sample `k`. Whole bands are checked."""
        layout = self._layouts[k]
        first, stop = rows
        assert 0 <= first < stop <= layout.rows, f"rows {rows} of {layout.rows}"
        top, bottom = layout.whole_bands(first, stop)
        width = layout.row_bytes
        data = np.empty((bottom - top) * width, np.uint8)
        left, offset, row = data.data, self._begins[k] + top * width, top
        step = max(1, _CHUNK_BYTES // (BAND_ROWS * width)) * BAND_ROWS
        while left:
            piece, left = left[: step * width], left[step * width :]
            self._fill(piece, descriptor, offset, what)
            self._check(piece, k, row, what)
            offset, row = offset + len(piece), row + step
        return data[(first - top) * width : (stop - top) * width]

    def _fill(self, piece: memoryview, descriptor: int, offset: int, what: str) -> None:
        try:
            found = _read_into(descriptor, piece, offset)
        except OSError as error:
            raise self._damaged(what, f"cannot be read: {error.strerror}") from error
        if found < len(piece):
            raise self._damaged(what, f"the file ends at least {len(piece) - found} bytes early")

    def _check(self, piece: memoryview, k: int, row: int, what: str) -> None:
        """Compare the bands of sample `k` that begin at `row` with their CRCs."""
        size = BAND_ROWS * self._layouts[k].row_bytes
        number = self._first_crc[k] + row // BAND_ROWS
        for begin in range(0, len(piece), size):
            if crc32(piece[begin : begin + size]) != self._crcs[number]:
                first = (number - self._first_crc[k]) * BAND_ROWS
                last = min(first + BAND_ROWS, self._layouts[k].rows) - 1
                raise self._damaged(what, f"checksum of rows {first} to {last} differs")
            number += 1

    def _damaged(self, what: str, reason: str) -> Damaged:
        return Damaged(f"{self._path}: {what} is damaged ({reason}); {remedy(self._path)}")


def _frame_damage(summary: ShardSummary) -> str:
    return (
        "outside the bytes of its samples it is not the shard that the manifest describes, so none "
        f"of them can be read, {summary.ids[0]!r} to {summary.ids[-1]!r}"
    )


def _read_into(descriptor: int, piece: memoryview, offset: int) -> int:
    done = 0
    while done < len(piece):  # a signal may shorten a read on a network file system
        got = os.preadv(descriptor, [piece[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done
