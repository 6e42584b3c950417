"""Checksums equal zlib's CRC32 with any library, since shards move between machines."""

from __future__ import annotations

import errno
import io
import random
import subprocess
import sys
import zlib

import numpy as np
import pytest

from hpc.storage.checksum import SummingFile, crc32, file_crc32

LENGTHS = (0, 1, 15, 16, 17, 255, 256, 4096, 92_160, 1_000_003)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_checksum_is_that_of_zlib(length):
    data = np.random.default_rng(length).integers(256, size=length, dtype=np.uint8)
    assert crc32(data.data) == zlib.crc32(data.tobytes())


def test_zlib_replaces_a_missing_isal():
    code = "import sys; sys.modules['isal'] = None; from hpc.storage.checksum import crc32; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(crc32.__module__, crc32(b'123456789'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["zlib", str(0xCBF43926)]  # the check value of CRC-32


def test_a_summing_file_has_the_checksum_of_its_file(tmp_path):
    draw = random.Random(0)
    pieces = [draw.randbytes(size) for size in (0, 1, 10**6, 3, 2**21, 7)]
    with (tmp_path / "file").open("wb") as file:
        summing = SummingFile(file)
        assert [summing.write(memoryview(piece)) for piece in pieces] == [*map(len, pieces)]
        summing.flush()
        assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert summing.crc32 == file_crc32(tmp_path / "file") == zlib.crc32(b"".join(pieces))


def test_a_disk_that_is_full_says_so():
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        SummingFile(Full()).write(bytes(2**20))
