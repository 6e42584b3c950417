"""A checksum of what is written, computed beside the writing."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from concurrent.futures import Executor

_WORTH_A_THREAD = 2**18  # bytes


class HashingFile:
    """A file for writing that takes the SHA-256 of all that goes through it. Large pieces are
    hashed by a thread of `beside` while this one writes them."""

    def __init__(self, file: BinaryIO, beside: Executor) -> None:
        self._file = file
        self._beside = beside
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """As a file's."""
        if len(data) < _WORTH_A_THREAD:
            self._sha256.update(data)
            return self._file.write(data)
        hashed = self._beside.submit(self._sha256.update, data)
        try:
            return self._file.write(data)
        finally:
            hashed.result()  # what `data` shows may be gone after this call

    def flush(self) -> None:
        """As a file's."""
        self._file.flush()

    def hexdigest(self) -> str:
        """Of all that was written so far."""
        return self._sha256.hexdigest()
