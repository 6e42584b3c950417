"""`python -m data_prep.verify DIR` finds any damage and names it."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest

from data_prep.pack import pack
from data_prep.shards.format import Entry
from data_prep.shards.manifest import Manifest
from data_prep.shards.writer import ShardWriter
from data_prep.verify import verify
from hpc.storage.atomic import file_sha256


def _flip(path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def test_a_good_data_set(rooms, command_line):
    pack("rooms", rooms.settings)
    code, printed, errors = command_line("data_prep.verify", rooms.shards)
    assert code == 0, errors
    assert printed.endswith("3 train, 1 val images, all as they were packed\n")


def test_all_damage_is_listed_and_the_first_is_the_error(rooms, command_line):
    pack("rooms", rooms.settings)
    path = rooms.shard("train-00000")
    with h5py.File(path) as file:
        begin, index = file["labels"].id.get_offset(), file["index"][:]
    for row in index[[0, 2]]:
        _flip(path, begin + int(row["labels_offset"]))
    code, printed, errors = command_line("data_prep.verify", rooms.shards)
    assert code == 2
    listed = printed.splitlines()
    assert len(listed) == 2
    assert "label map 'a'" in listed[0] and "label map 'Ä'" in listed[1]
    assert "label map 'a' is damaged" in errors and "(and 1 more" in errors


def test_a_flipped_byte_anywhere_in_a_shard_is_found(rooms):
    manifest = pack("rooms", rooms.settings)
    path = rooms.shard("val-00000")
    whole = path.read_bytes()
    for position in np.linspace(0, len(whole) - 1, 60).astype(int):
        _flip(path, int(position))
        assert verify(manifest), f"the flip at byte {position} was not found"
        path.write_bytes(whole)
    assert verify(manifest) == []


def test_a_missing_shard(rooms):
    manifest = pack("rooms", rooms.settings)
    path = rooms.shard("val-00000")
    path.unlink()
    assert [p for p in verify(manifest) if f"{path.name} cannot be read: No such file" in p]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"class_pixels": (1, 2, 3)}, "class pixels"),
        ({"void_pixels": 0}, "void pixels"),
        ({"ids": ("x",)}, "ids"),
        ({"sizes": ((1, 2),)}, "sizes"),
        ({"sha256": "0" * 64}, "SHA-256"),
    ],
)
def test_a_manifest_that_differs_from_its_shards(rooms, change, named):
    manifest = pack("rooms", rooms.settings)
    [shard] = manifest.splits["val"].shards
    val = dataclasses.replace(
        manifest.splits["val"], shards=(dataclasses.replace(shard, **change),)
    )
    [problem] = verify(dataclasses.replace(manifest, splits={"val": val}))
    assert f"{shard.file}: {named} of shard and manifest differ" in problem


def test_a_label_value_that_is_no_class(rooms):
    manifest = pack("rooms", rooms.settings)
    [shard] = manifest.splits["val"].shards
    path = rooms.shards / shard.file
    with ShardWriter(path, [Entry("v", 2, 2, "raw", 12)]) as writer:
        writer.add(np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 3, np.uint8))
    changes = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    shard = dataclasses.replace(
        shard, arenas=writer.arenas, frame_sha256=writer.frame_sha256, **changes
    )
    val = dataclasses.replace(manifest.splits["val"], shards=(shard,))
    [problem] = verify(dataclasses.replace(manifest, splits={"val": val}))
    assert "label map 'v' holds 3, which is neither one of 3 classes nor void" in problem


def test_a_folder_that_was_never_packed(tmp_path, command_line):
    code, _, errors = command_line("data_prep.verify", tmp_path)
    assert code == 2 and "no manifest.json" in errors


def test_the_manifest_survives_being_saved_and_loaded(rooms):
    manifest = pack("rooms", rooms.settings)
    assert Manifest.load(rooms.shards) == manifest
