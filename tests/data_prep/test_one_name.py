"""A data set of the same name, with other images or settings, never replaces packed data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep.pack import pack
from data_prep.settings import parse_dataset
from data_prep.shards.manifest import Manifest
from data_prep.verify import verify
from hpc.cli import UserError
from tests.data_prep.conftest import Folder


def other(rooms: Folder, **table) -> Folder:
    """Return a second folder of images with the same folder of shards."""
    folder = Folder(rooms.root / "other", {"shards": str(rooms.shards), **table})
    for split in ("train", "val"):
        folder.pair("x", split=split)
    return folder


def test_images_of_another_root_are_not_packed_over_existing_shards(rooms):
    before = pack("rooms", rooms.settings)
    with pytest.raises(UserError) as refused:
        pack("rooms", other(rooms).settings)
    assert str(refused.value) == (
        f"{rooms.shards} was packed with other settings than [dataset.rooms] has now (root = "
        f"'{rooms.root}' there, '{rooms.root}/other' here); set shards to another folder, or "
        "delete that one if no grid needs it"
    )
    assert Manifest.load(rooms.shards) == before and verify(before, processes=1) == []


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"void": 9}, "void = 11 there, 9 here"),
        ({"classes": ["wall", "floor"]}, "classes = ['wall', 'floor', 'door'] there, ['wall', 'fl"),
        ({"codec": "raw"}, "codec = not set there, 'raw' here"),
    ],
)
def test_other_settings_are_not_packed_over_existing_shards(rooms, table, told):
    pack("rooms", rooms.settings)
    rooms.table |= table
    with pytest.raises(UserError, match="was packed with other settings") as refused:
        pack("rooms", rooms.settings)
    assert told in str(refused.value)


def test_images_that_moved_keep_their_shards(rooms):
    before = pack("rooms", rooms.settings)
    moved = Folder(rooms.root / "moved", {"shards": str(rooms.shards)})
    for name in ("train", "trainannot", "val", "valannot"):
        shutil.move(rooms.root / name, moved.root / name)
    after = pack("rooms", moved.settings)
    assert after.files == before.files and after.fingerprint == before.fingerprint
    assert Manifest.load(rooms.shards).origin == moved.settings.origin()


def test_a_copy_elsewhere_is_the_same_data_set(rooms, tmp_path):
    copied = Folder(tmp_path / "copied")
    shutil.copytree(rooms.root / "train", copied.root / "train", copy_function=shutil.copyfile)
    for name in ("trainannot", "val", "valannot"):
        shutil.copytree(rooms.root / name, copied.root / name)
    one, two = pack("rooms", rooms.settings), pack("rooms", copied.settings)
    assert one.fingerprint == two.fingerprint and one.files == two.files
    assert rooms.settings.identity() == copied.settings.identity()


FOLDER = {"source": "folder", "root": "/images", "classes": ["a", "b"]}
VOC = {"source": "voc", "root": "/pascal", "train": "mine.txt"}
DRAWN = {"source": "synthetic"}


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        (FOLDER, {"root": "/others"}),
        (FOLDER, {"val_images": "test"}),
        (FOLDER, {"shard_mb": 64}),
        (VOC, {"train": "yours.txt"}),
        (DRAWN, {"seed": 1}),
    ],
)
def test_each_data_set_has_a_folder_of_its_own(table, changes):
    folders = {
        parse_dataset("rooms", {**table, **more}, "grid.toml").shards
        for more in ({}, {"skip_bad": True}, changes)
    }
    assert len(folders) == 2
    assert all(Path(folder).parent == Path("data").absolute() for folder in folders)
    assert all(Path(folder).name.startswith("rooms-") for folder in folders)


def test_a_path_is_the_same_however_it_is_written(tmp_path, monkeypatch):
    written = {
        parse_dataset(
            "rooms",
            {**VOC, "root": root, "train": train},
            "g",
        ).shards.split("/")[-1]
        for place, root, train in [
            (tmp_path, "voc", "mine.txt"),
            (tmp_path.parent, f"{tmp_path.name}/voc", f"{tmp_path}/mine.txt"),
        ]
        if monkeypatch.chdir(place) is None
    }
    assert len(written) == 1


def test_a_list_in_the_home_of_an_unknown_user_is_refused_when_it_is_read():
    """Every command parses the table, even if it reads no list."""
    table = {"source": "voc", "root": "/voc", "train": "~nobody-at-all/list.txt"}
    settings = parse_dataset("voc", table, "grid.toml")
    assert settings.origin()["train"].endswith("/~nobody-at-all/list.txt")
