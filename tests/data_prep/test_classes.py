"""A data set whose label maps lack a class gives a warning; one with only void is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from data_prep.pack import pack
from data_prep.shards.manifest import Manifest
from hpc.cli import UserError

SIZES = {"a": (20, 31), "b": (70, 30), "Ä": (130, 9)}


def relabel(rooms, split, values):
    for stem, size in SIZES.items() if split == "train" else [("v", (20, 30))]:
        rooms.label(f"{stem}.png", size, split, values)


NOT_LEARNT = (
    "the class 'door' of the data set 'rooms' has no pixel in train, of which {share:.1f} % are "
    "void: no cell can learn it; add images that show it, or take it out of the classes"
)
NOT_SCORED = (
    "the class 'wall' of the data set 'rooms' has no pixel in val, of which {share:.1f} % are "
    "void: scores are averaged over the classes that do occur; add images that show it, or take it "
    "out of the classes"
)


@pytest.mark.parametrize(
    ("split", "values", "warning"),
    [("train", (0, 1, 11), NOT_LEARNT), ("val", (1, 2, 11), NOT_SCORED)],
)
def test_a_class_that_never_occurs_is_warned_of_in_one_line(
    rooms, command_line, split, values, warning
):
    relabel(rooms, split, values)
    labels = [np.asarray(Image.open(f)) for f in (rooms.root / f"{split}annot").iterdir()]
    void = np.concatenate([label.reshape(-1) for label in labels]) == 11
    warning = warning.format(share=100 * void.mean())
    for _ in range(2):  # when it is packed, and when it is found packed
        code, _, errors = command_line("data_prep.pack", rooms.config(), "--processes", 1)
        assert code == 0
        assert [x for x in errors.splitlines() if "shards:" not in x] == [f"warning: {warning}"]
    assert Manifest.load(rooms.shards).warnings() == [warning]


def test_no_warning_where_all_classes_occur(rooms, command_line):
    code, _, errors = command_line("data_prep.pack", rooms.config(), "--processes", 1)
    assert code == 0 and "warning" not in errors


@pytest.mark.parametrize("split", ["train", "val"])
def test_void_everywhere_is_refused_and_what_was_packed_serves_the_next_run(rooms, split):
    relabel(rooms, split, (11,))
    with pytest.raises(UserError) as refused:
        pack("rooms", rooms.settings)
    assert str(refused.value).startswith(
        f"no class has pixels in {split} of the data set 'rooms'; 100.0 % of the pixels are void "
        "(label value 11); at least two are needed: map the label values to classes, such as "
    )
    other = {"train": "val", "val": "train"}[split]
    kept = {p: p.stat().st_mtime_ns for p in rooms.shards.glob(f"{other}-*.h5")}
    assert kept and not (rooms.shards / "manifest.json").exists()
    relabel(rooms, split, (0, 1, 2))
    assert pack("rooms", rooms.settings).warnings() == []
    assert kept == {p: p.stat().st_mtime_ns for p in rooms.shards.glob(f"{other}-*.h5")}


def test_one_image_that_is_all_void_is_as_good_as_any(rooms):
    rooms.label("a.png", SIZES["a"], values=(11,))
    train = pack("rooms", rooms.settings).splits["train"]
    assert train.images == 3 and train.void_pixels >= 20 * 31


def test_a_long_list_of_classes_is_cut(rooms):
    manifest = pack("rooms", rooms.settings)
    [shard] = manifest.splits["val"].shards
    none = dataclasses.replace(shard, class_pixels=(5, *[0] * 9))
    many = Manifest(
        rooms.shards,
        "rooms",
        tuple("abcdefghij"),
        {"val": dataclasses.replace(manifest.splits["val"], shards=(none,))},
    )
    [warning] = many.warnings()
    assert warning.startswith("each of the classes 'b', 'c', 'd' and 6 more of the data set")
