"""What goes through a hashing file is written and hashed, in order, whatever its pieces."""

from __future__ import annotations

import errno
import hashlib
import io
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from hpc.hashing import HashingFile


@pytest.fixture
def beside():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_pieces_of_all_sizes_give_the_hash_of_the_whole(beside):
    draw = random.Random(0)
    pieces = [draw.randbytes(size) for size in (0, 1, 10**6, 3, 2**18, 2**18 - 1, 2**21, 7)]
    file = io.BytesIO()
    hashing = HashingFile(file, beside)
    assert [hashing.write(piece) for piece in pieces] == [len(piece) for piece in pieces]
    assert file.getvalue() == b"".join(pieces)
    assert hashing.hexdigest() == hashlib.sha256(file.getvalue()).hexdigest()


def test_a_buffer_may_change_once_it_was_written(beside):
    buffer = bytearray(2**20)
    hashing = HashingFile(io.BytesIO(), beside)
    expected = hashlib.sha256()
    for number in range(20):
        buffer[:] = bytes([number]) * len(buffer)
        expected.update(buffer)
        hashing.write(memoryview(buffer))
    assert hashing.hexdigest() == expected.hexdigest()


def test_a_disk_that_is_full_says_so(beside):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        HashingFile(Full(), beside).write(bytes(2**20))
