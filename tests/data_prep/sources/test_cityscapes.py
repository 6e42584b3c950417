"""Cityscapes from its official layout: three sets of classes from the raw ids."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from torchvision.datasets import Cityscapes

from data_prep.pack import pack
from data_prep.packing.shard_plan import find_source
from hpc.cli import UserError
from tests.data_prep.sources import trees

OFFICIAL = [c for c in Cityscapes.classes if c.id >= 0]  # name, id, train_id, ...
EVERY_ID = np.arange(34, dtype=np.uint8).reshape(2, 17).repeat(3, 0)
STREET = np.full((15, 33), 7, np.uint8)
STREET[:3] = 23
STREET[12:] = 1  # the bonnet of the car that drives
STREET[5, 5] = 33
FRANKFURT = np.full((9, 21), 26, np.uint8)
FRANKFURT[8] = 7
TRAIN = {
    "ulm/ulm_000000_000019": STREET,
    "aachen/aachen_000001_000019": EVERY_ID,
    "aachen/aachen_000000_000019": STREET[:, ::-1].copy(),
}
VAL = {"frankfurt/frankfurt_000000_000294": FRANKFURT}


@pytest.fixture
def tree(tmp_path):
    trees.cityscapes(tmp_path, train=TRAIN, val=VAL)
    (tmp_path / "leftImg8bit/train/license.txt").write_text("not a city")
    return tmp_path


def refusal(root, **table) -> str:
    with pytest.raises(UserError) as refused:
        pack("cityscapes", trees.settings("cityscapes", root, **table))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def expected_classes(num_classes: int) -> dict[int, str]:
    """Return the class names by raw id, from Cityscapes' own table."""
    if num_classes == 19:
        chosen = [c for c in OFFICIAL if 0 <= c.train_id < 19]
        assert [c.train_id for c in chosen] == list(range(19))
    else:
        chosen = [c for c in OFFICIAL if c.id >= {30: 4, 34: 0}[num_classes]]
    return {c.id: c.name for c in chosen}


@pytest.mark.parametrize("num_classes", [30, 34, 19])
def test_raw_ids_become_the_chosen_classes_and_all_others_void(tree, num_classes):
    manifest = pack("cityscapes", trees.settings("cityscapes", tree, num_classes=num_classes))
    classes = expected_classes(num_classes)
    assert manifest.classes == tuple(classes.values()) and len(classes) == num_classes
    index_of = {raw: index for index, raw in enumerate(classes)}
    train = trees.Packed(manifest).split("train")
    for one, raw in TRAIN.items():
        wanted = [[index_of.get(int(value), 255) for value in row] for row in raw]
        np.testing.assert_array_equal(train[one][1], np.array(wanted, np.uint8))


def test_thirty_classes_are_the_default_and_each_set_is_another_data_set(tree):
    default = trees.settings("cityscapes", tree)
    sets = {n: trees.settings("cityscapes", tree, num_classes=n).identity() for n in (30, 34, 19)}
    assert default.identity() == sets[30] and len(set(sets.values())) == 3


def test_ids_are_city_and_stem_and_png_images_are_kept_raw(tree):
    manifest = pack("cityscapes", trees.settings("cityscapes", tree))
    packed = trees.Packed(manifest)
    assert list(packed.split("train")) == sorted(TRAIN) and list(packed.split("val")) == list(VAL)
    pixels = sum(4 * raw.size for raw in TRAIN.values())  # three channels and a label
    assert manifest.splits["train"].shards[0].bytes > pixels


def test_torchvision_finds_the_same_pictures_in_the_same_tree(tree):
    (tree / "leftImg8bit/train/license.txt").unlink()  # which torchvision takes for a city
    train = trees.Packed(pack("cityscapes", trees.settings("cityscapes", tree))).split("train")
    theirs = Cityscapes(str(tree), "train", "fine", "semantic")
    assert len(theirs) == len(train)
    for (image, _), path in zip(theirs, theirs.images, strict=True):
        city, name = path.split("/")[-2:]
        ours = train[f"{city}/{name.removesuffix('_leftImg8bit.png')}"]
        np.testing.assert_array_equal(ours[0], np.asarray(image))


def test_a_licence_plate_which_has_no_raw_id_is_void_in_every_set(tree):
    raw = STREET.copy()
    raw[6, 6] = 255  # -1 in eight bits
    trees.cityscapes(tree, train={"ulm/ulm_000000_000019": raw})
    for num_classes in (30, 34, 19):
        shards = str(tree / f"shards {num_classes}")
        settings = trees.settings("cityscapes", tree, num_classes=num_classes, shards=shards)
        label = trees.Packed(pack("cityscapes", settings)).split("train")["ulm/ulm_000000_000019"]
        assert label[1][6, 6] == 255 and label[1][6, 7] != 255


def test_an_unknown_number_of_classes_is_refused(tree):
    with pytest.raises(UserError, match=r"num_classes: Input should be 30, 34 or 19, not 20"):
        trees.settings("cityscapes", tree, num_classes=20)


def test_a_raw_id_beyond_the_table_is_named(tree):
    trees.cityscapes(tree, train={"ulm/ulm_000000_000019": STREET + 30})
    message = refusal(tree)
    assert "ulm_000000_000019_gtFine_labelIds.png holds the label value " in message


def test_images_and_label_maps_must_pair(tree):
    label = tree / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png"
    label.unlink()
    message = refusal(tree)
    assert f"gtFine/train/aachen has no {label.name}, which an image in " in message
    shutil.rmtree(tree / "gtFine/train/aachen")
    assert "gtFine/train/aachen: No such file or directory; " in refusal(tree)


def test_a_label_map_without_its_image_and_a_city_without_any(tree):
    image = tree / "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png"
    image.unlink()
    message = refusal(tree)
    assert f"leftImg8bit/train/aachen has no {image.name}, which a label map in " in message
    shutil.rmtree(tree / "leftImg8bit/train/aachen")
    assert "leftImg8bit/train has no aachen, which " in refusal(tree)


def test_a_root_without_cityscapes_names_the_download(tmp_path):
    message = refusal(tmp_path)
    assert "leftImg8bit/train: No such file" in message
    assert "gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com/downloads" in message


def test_a_folder_of_no_pictures(tree):
    for path in (tree / "leftImg8bit/val/frankfurt").iterdir():
        path.unlink()
    shutil.rmtree(tree / "gtFine/val/frankfurt")
    (tree / "gtFine/val/frankfurt").mkdir()
    with pytest.raises(UserError, match=r"leftImg8bit/val holds no CITY/\*_leftImg8bit\.png"):
        find_source(trees.settings("cityscapes", tree))
