"""The format of a shard: an HDF5 file of two contiguous byte arenas and an index.

    pixels      uint8, contiguous: raw images (H*W*3 bytes, RGB rows) or a JPEG's own bytes
    labels      uint8, contiguous: label maps (H*W bytes), class index or VOID
    index       one row per sample: id, pixels_offset, pixels_size, labels_offset, height, width,
                codec
    pixels_crc  CRC32 of each band of 64 rows, sample after sample (encoded: one for all bytes)
    labels_crc  the same for label maps

Every byte has a checksum. Bytes of the arenas have the CRC of their band. All others (the frame)
have the SHA-256 of the frame in the manifest, which is checked before HDF5 opens the file.
"""

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

BAND_ROWS = 64  # rows that share a CRC, so that a window is checked without reading all rows
CODECS: tuple[Codec, ...] = ("raw", "encoded")  # in the order of their numbers in the index


class RowLayout(NamedTuple):
    """The rows of an image or label map in an arena. An encoded image is one row of all bytes."""

    rows: int
    row_bytes: int

    @property
    def size(self) -> int:
        """Return the number of bytes in the arena."""
        return self.rows * self.row_bytes

    @property
    def num_bands(self) -> int:
        """Return the number of bands, each with a CRC."""
        return -(-self.rows // BAND_ROWS)

    def whole_bands(self, first: int, stop: int) -> tuple[int, int]:
        """Return the rows [first, stop), widened to whole bands."""
        stop = -(-stop // BAND_ROWS) * BAND_ROWS
        return first // BAND_ROWS * BAND_ROWS, min(stop, self.rows)


@dataclass(frozen=True)
class Entry:
    """One sample in the index of a shard."""

    id: str
    height: int
    width: int
    codec: Codec
    pixels_size: int  # bytes in the arena

    @property
    def pixels(self) -> RowLayout:
        """Return the rows of the image in its arena."""
        if self.codec == "encoded":
            return RowLayout(1, self.pixels_size)
        return RowLayout(self.height, self.width * 3)

    @property
    def labels(self) -> RowLayout:
        """Return the rows of the label map in its arena."""
        return RowLayout(self.height, self.width)


def index_table(entries: Sequence[Entry]) -> NDArray[np.void]:
    """Return the HDF5 dataset `index` of `entries`. The offsets follow from the sizes."""
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
        for e, p, q in zip(entries, pixels, labels, strict=False)  # the last offsets are the ends
    ]
    return np.array(rows, np.dtype(columns))


def read_entry(row: Any) -> Entry:
    """Return the entry of one row of the index."""
    size, codec = int(row["pixels_size"]), CODECS[int(row["codec"])]
    return Entry(row["id"].decode(), int(row["height"]), int(row["width"]), codec, size)


def frame_sha256(path: Path, arenas: Sequence[tuple[int, int]]) -> str:
    """Return the SHA-256 of a shard's bytes outside its `arenas`, given as (offset, bytes).

    These are the index, the CRCs, HDF5's own structures and padding. The CRCs among them pin the
    content of the arenas, which are not read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset, size in sorted(arenas):
            digest.update(file.read(max(0, offset - file.tell())))
            file.seek(offset + size)
        digest.update(file.read())
    return digest.hexdigest()
