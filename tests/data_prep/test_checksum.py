"""Checksums are zlib's CRC32, whatever computes them: shards travel between machines."""

from __future__ import annotations

import subprocess
import sys
import zlib

import numpy as np
import pytest

from data_prep.checksum import crc32

LENGTHS = (0, 1, 15, 16, 17, 255, 256, 4096, 92_160, 1_000_003)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_checksum_is_that_of_zlib(length):
    data = np.random.default_rng(length).integers(256, size=length, dtype=np.uint8)
    assert crc32(data.data) == zlib.crc32(data.tobytes())


def test_where_isal_is_missing_zlib_takes_its_place():
    code = "import sys; sys.modules['isal'] = None; from data_prep.checksum import crc32; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(crc32.__module__, crc32(b'123456789'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["zlib", str(0xCBF43926)]  # the check value of CRC-32
