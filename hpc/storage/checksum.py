"""Compute CRC32 (as in zlib, PNG and Ethernet) of bytes and files, with the fastest library."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

try:
    # uses the processor's carry-less multiplication, 10 times as fast as zlib; with zlib the checks
    # would take most of the time to read
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine; the values are the same
    from zlib import crc32

__all__ = ["SummingFile", "crc32", "file_crc32"]

_CHUNK_BYTES = 2**20


class SummingFile:
    """A wrapper of a binary file that keeps the `crc32` of all bytes written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc32 = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write `data` and return the number of bytes written."""
        self.crc32 = crc32(data, self.crc32)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush the file's buffer."""
        self._file.flush()


def file_crc32(path: str | Path) -> int:
    """Return the CRC32 of a file's content."""
    found, buffer = 0, bytearray(_CHUNK_BYTES)
    with Path(path).open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found = crc32(memoryview(buffer)[:size], found)
    return found
