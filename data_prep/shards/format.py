"""How samples lie in a shard: their bytes in the arenas, the index's table, and the frame, which is
every other byte of the file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep.images import Codec

BAND_ROWS = 64  # rows that share a CRC: a window of a large image is checked without all of it
CODECS: tuple[Codec, ...] = ("raw", "encoded")  # their numbers in the index


class RowLayout(NamedTuple):
    """How a sample's bytes lie in an arena; an encoded image is one row of all its bytes."""

    rows: int
    row_bytes: int

    @property
    def size(self) -> int:
        """Bytes in the arena."""
        return self.rows * self.row_bytes

    @property
    def num_bands(self) -> int:
        """How many CRCs it has."""
        return -(-self.rows // BAND_ROWS)

    def whole_bands(self, first: int, stop: int) -> tuple[int, int]:
        """The rows [first, stop) of the bands that cover the rows [first, stop)."""
        stop = -(-stop // BAND_ROWS) * BAND_ROWS
        return first // BAND_ROWS * BAND_ROWS, min(stop, self.rows)


@dataclass(frozen=True)
class Entry:
    """What is known of a sample before its pixels are read."""

    id: str
    height: int
    width: int
    codec: Codec
    pixels_size: int  # bytes in the arena

    @property
    def pixels(self) -> RowLayout:
        """The image in its arena."""
        if self.codec == "encoded":
            return RowLayout(1, self.pixels_size)
        return RowLayout(self.height, self.width * 3)

    @property
    def labels(self) -> RowLayout:
        """The label map in its arena."""
        return RowLayout(self.height, self.width)


def index_table(entries: Sequence[Entry]) -> NDArray[np.void]:
    """The rows of the dataset `index`; offsets follow from the sizes."""
    longest = max(len(entry.id.encode()) for entry in entries)
    codec = h5py.enum_dtype({name: number for number, name in enumerate(CODECS)}, basetype="u1")
    columns = [
        ("id", h5py.string_dtype("utf-8", longest)),
        ("pixels_offset", "<u8"),
        ("pixels_size", "<u8"),
        ("labels_offset", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("codec", codec),
    ]
    pixels = accumulate((e.pixels.size for e in entries), initial=0)
    labels = accumulate((e.labels.size for e in entries), initial=0)
    rows = [
        (e.id.encode(), p, e.pixels.size, q, e.height, e.width, CODECS.index(e.codec))
        for e, p, q in zip(entries, pixels, labels, strict=False)  # the last sums begin no entry
    ]
    return np.array(rows, np.dtype(columns))


def read_entry(row: Any) -> Entry:
    """The entry that a row of the index describes."""
    size, codec = int(row["pixels_size"]), CODECS[int(row["codec"])]
    return Entry(row["id"].decode(), int(row["height"]), int(row["width"]), codec, size)


def frame_sha256(path: Path, arenas: Sequence[tuple[int, int]]) -> str:
    """SHA-256 of a shard's bytes outside its arenas, each (offset, bytes): index, CRCs, HDF5's own
    structures and padding. The CRCs among them pin the content without reading the arenas."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset, size in sorted(arenas):
            digest.update(file.read(max(0, offset - file.tell())))
            file.seek(offset + size)
        digest.update(file.read())
    return digest.hexdigest()
