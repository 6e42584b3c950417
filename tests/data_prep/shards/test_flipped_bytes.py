"""A flipped byte anywhere in a shard is reported with file and sample, or all samples affected."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.pack import pack
from data_prep.shards.reader import ShardFile, SplitReader
from data_prep.verify import verify
from hpc.storage.atomic import Damaged


@contextmanager
def flipped(path: Path, position: int, mask: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR)
    byte = os.pread(descriptor, 1, position)
    try:
        os.pwrite(descriptor, bytes([byte[0] ^ mask]), position)
        yield
    finally:
        os.pwrite(descriptor, byte, position)
        os.close(descriptor)


def owners(path: Path) -> list[str]:
    """Return for each byte of a shard its owner by HDF5: `image 'a'`, `label map 'a'`, or none."""
    names = [""] * path.stat().st_size
    with h5py.File(path) as file:
        for row in file["index"][:]:
            stem, pixels = row["id"].decode(), int(row["height"]) * int(row["width"])
            for arena, what, size in (
                ("pixels", "image", int(row["pixels_size"])),
                ("labels", "label map", pixels),
            ):
                begin = file[arena].id.get_offset() + int(row[f"{arena}_offset"])
                names[begin : begin + size] = [f"{what} {stem!r}"] * size
    return names


@pytest.fixture
def small_rooms(rooms):
    rooms.table["shard_mb"] = 1
    for stem, size in (("b", (70, 4)), ("Ä", (66, 3))):
        rooms.pair(stem, size)
    rooms.pair("a", (8, 8), suffix=".jpg")
    return rooms


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_a_reader_names_any_flipped_byte(small_rooms, mask):
    [summary] = pack("rooms", small_rooms.settings).splits["train"].shards
    path = small_rooms.shards / summary.file
    opened = ShardFile(path, summary)
    numbers = {entry.id: k for k, entry in enumerate(opened.entries)}
    for position, owner in enumerate(owners(path)):
        with flipped(path, position, mask), pytest.raises(Damaged) as damage:
            if not owner:
                ShardFile(path, summary)
            what, stem = owner.rsplit(" ", 1)
            k = numbers[stem.strip("'")]
            opened.image(k) if what == "image" else opened.label(k)
        expected = f"{owner} is damaged" if owner else "none of them can be read, 'a' to 'Ä'"
        assert expected in str(damage.value), position
        assert str(path) in str(damage.value) and "data_prep.pack CONFIG" in str(damage.value)


def test_verify_lists_flipped_bytes_with_file_and_sample(small_rooms):
    manifest = pack("rooms", small_rooms.settings)
    path = small_rooms.shard("train-00000")
    found = owners(path)
    for position in np.linspace(0, len(found) - 1, 150).astype(int):
        with flipped(path, int(position), 0x10):
            [problem] = verify(manifest)
        expected = f"{found[position]} is damaged" if found[position] else "'a' to 'Ä'"
        assert expected in problem and str(path) in problem, position
    assert verify(manifest) == []


def test_a_damaged_frame_is_refused_before_hdf5_opens_the_file(small_rooms, monkeypatch):
    manifest = pack("rooms", small_rooms.settings)
    monkeypatch.setattr("h5py.File", None)
    with (
        flipped(small_rooms.shard("train-00000"), 9, 1),
        pytest.raises(Damaged, match=r"train-00000-\w+\.h5 is damaged \(outside the bytes of its"),
    ):
        SplitReader(manifest, "train").label(0)


def test_a_disk_that_fails_while_a_sample_is_read_is_named_with_the_sample(rooms, monkeypatch):
    reader = SplitReader(pack("rooms", rooms.settings), "train")
    reader.label(0)

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", failing)
    expected = re.escape(".h5: image 'b' is damaged (cannot be read: Input/output error")
    with pytest.raises(Damaged, match=expected):
        reader.image(1)
