"""The CRC32 of bytes, as zlib, PNG and Ethernet have it, by the fastest way that is installed; that
of files, while they are written and later."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

try:
    # by the processor's carry-less multiplication: ten times as fast as zlib's, whose checks would
    # cost more than all else of reading
    from isal.isal_zlib import crc32
except ImportError:  # it has no wheel for this machine; the numbers are the same
    from zlib import crc32

__all__ = ["SummingFile", "crc32", "file_crc32"]

_PIECE = 2**20  # bytes that are read at once


class SummingFile:
    """A file for writing, and the `crc32` of all that went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc32 = 0

    def write(self, data: bytes | memoryview) -> int:
        """As a file's."""
        self.crc32 = crc32(data, self.crc32)
        return self._file.write(data)

    def flush(self) -> None:
        """As a file's."""
        self._file.flush()


def file_crc32(path: str | Path) -> int:
    """Of a file's content."""
    found, buffer = 0, bytearray(_PIECE)
    with Path(path).open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found = crc32(memoryview(buffer)[:size], found)
    return found
