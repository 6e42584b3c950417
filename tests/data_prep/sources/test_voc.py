"""VOC 2012 from its official layout: lists, palettes, borders, and what can be missing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCSegmentation
from torchvision.models.segmentation import FCN_ResNet101_Weights

from data_prep.pack import pack
from data_prep.packing.shard_plan import find_source
from data_prep.sources import voc
from hpc.cli import UserError
from tests.data_prep.sources import trees

ROAD_SCENE = np.zeros((37, 51), np.uint8)
ROAD_SCENE[5:20, 3:30] = 7  # a car
ROAD_SCENE[4, 3:30] = 255  # its border
PEOPLE = np.full((50, 33), 15, np.uint8)
PEOPLE[:, 16] = 255
PEOPLE[0, 0] = 20
STRIP = np.eye(1, 9, 3, np.uint8)
LABELS = {"2007_000032": ROAD_SCENE, "2009_000010": PEOPLE, "2011_003271": STRIP}
LISTS = {
    "train": "2009_000010\n2007_000032\n",
    "val": "2011_003271",
    "trainval": "2007_000032\n2009_000010\n2011_003271\n",
}


@pytest.fixture
def tree(tmp_path):
    trees.voc(tmp_path, LABELS, grey=["2009_000010"], **LISTS)
    return tmp_path


def refusal(root, **table) -> str:
    with pytest.raises(UserError) as refused:
        find_source(trees.settings("voc", root, **table))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_classes_are_those_of_torchvisions_weights_in_their_order(tree):
    classes = pack("voc", trees.settings("voc", tree)).classes
    official = FCN_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert list(classes) == ["background", *official[1:]]


def test_label_maps_are_the_palettes_indices_with_borders_void(tree):
    manifest = pack("voc", trees.settings("voc", tree))
    packed = trees.Packed(manifest)
    train, val = packed.split("train"), packed.split("val")
    assert list(train) == ["2007_000032", "2009_000010"] and list(val) == ["2011_003271"]
    for one, (_, label) in (train | val).items():
        np.testing.assert_array_equal(label, LABELS[one])
    assert manifest.splits["train"].void_pixels == 27 + 50


def test_torchvision_reads_the_same_from_the_same_tree(tree):
    packed = trees.Packed(pack("voc", trees.settings("voc", tree))).split("train")
    theirs = VOCSegmentation(str(tree), image_set="train")
    assert len(theirs) == len(packed)
    for (image, target), name in zip(theirs, theirs.images, strict=True):
        ours = packed[name.rsplit("/", 1)[-1][:-4]]
        np.testing.assert_array_equal(ours[0], np.asarray(image.convert("RGB")))
        np.testing.assert_array_equal(ours[1], np.asarray(target))


def test_a_grey_jpeg_stays_encoded_and_decodes_to_three_equal_channels(tree):
    manifest = pack("voc", trees.settings("voc", tree))
    image, _ = trees.Packed(manifest).split("train")["2009_000010"]
    assert (image == image[..., :1]).all() and image.std() > 0
    jpegs = sum(f.stat().st_size for f in (tree / "VOCdevkit/VOC2012/JPEGImages").iterdir())
    record = sum(shard.bytes for half in manifest.splits.values() for shard in half.shards)
    assert jpegs < record < jpegs + sum(2 * label.size for label in LABELS.values()) + 40_000


def test_a_rotation_in_exif_is_ignored(tree):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = tree / "VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg"
    trees.picture(path, ROAD_SCENE.shape, exif=exif)
    image, label = trees.Packed(pack("voc", trees.settings("voc", tree))).split("train")[path.stem]
    assert image.shape[:2] == label.shape == ROAD_SCENE.shape


def test_train_and_val_may_be_any_list_or_a_file_of_the_user(tree, monkeypatch):
    monkeypatch.chdir(tree)
    (tree / "mine.txt").write_bytes(b"\xef\xbb\xbf2011_003271\r\n\r\n  2007_000032 \r\n\r\n")
    source = find_source(trees.settings("voc", tree, train="trainval", val="mine.txt"))
    ids = {split: [one.id for one in found] for split, found in source.samples.items()}
    assert ids == {"train": sorted(LABELS), "val": ["2007_000032", "2011_003271"]}


def test_another_list_is_another_data_set(tree):
    settings = [trees.settings("voc", tree, train=name) for name in ("train", "trainval")]
    assert settings[0].identity() != settings[1].identity()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.txt is empty; it must hold one id per line"),
        ("a\nb\n\na\n", "mine.txt holds 'a' twice, in lines 1 and 4; remove one"),
        ("a\n/JPEGImages/b.jpg /SegmentationClass/b.png\n", "mine.txt, line 2: "),
        ("../../secret\n", "mine.txt, line 1: '../../secret' is not an id"),
        ("2007_000032\nnone\nneither\n", "JPEGImages has no neither.jpg and 1 more, which "),
    ],
)
def test_a_malformed_list_is_refused(tree, text, message):
    (tree / "mine.txt").write_text(text)
    assert message in refusal(tree, train=str(tree / "mine.txt"))


def test_a_missing_list_is_refused(tree):
    assert "has no list 'tran'; did you mean 'train' or 'trainval'?" in refusal(tree, train="tran")
    assert "cannot read the list" in refusal(tree, val=str(tree / "lost.txt"))


def test_an_image_or_a_label_map_that_the_list_names_is_missing(tree):
    home = tree / "VOCdevkit/VOC2012"
    (home / "SegmentationClass/2009_000010.png").unlink()
    message = refusal(tree)
    assert "SegmentationClass has no 2009_000010.png, which " in message
    assert "Segmentation/train.txt asks for; the data set's root must be the folder in" in message
    (home / "JPEGImages/2007_000032.jpg").unlink()
    assert "JPEGImages has no 2007_000032.jpg, which " in refusal(tree)


def test_a_root_without_voc_names_the_download(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert "nowhere/VOCdevkit/VOC2012/ImageSets/Segmentation: No such file" in message
    assert "VOCtrainval_11-May-2012.tar of http://host.robots.ox.ac.uk/pascal/VOC/" in message
    assert "docs/how-to/public-data-sets.md" in message


def test_a_label_that_is_no_class_is_named(tree):
    bad = np.full(PEOPLE.shape, 21, np.uint8)
    trees.voc(tree, {"2009_000010": bad})
    with pytest.raises(UserError, match=r"2009_000010\.png holds the label value 21, but classes"):
        pack("voc", trees.settings("voc", tree))


def test_a_palette_that_an_editor_has_compacted_is_refused(tree):
    path = tree / "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png"
    trees.compacted(path)  # 0, 7, 255 become 0, 1, 2
    with pytest.raises(UserError) as refused:
        pack("voc", trees.settings("voc", tree))
    assert str(refused.value).startswith(
        f"{path}: palette entry 1 is the colour (128, 128, 128), not (128, 0, 0) of VOC's "
        "'aeroplane', so its values are not VOC's; restore the original file"
    )


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_grey_label_map_is_read_by_its_values(tree, mode):
    path = tree / "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png"
    image = Image.fromarray(ROAD_SCENE, mode)
    if mode == "P":
        image.putpalette(np.arange(256, dtype=np.uint8).repeat(3).tobytes())
    image.save(path)
    train = trees.Packed(pack("voc", trees.settings("voc", tree))).split("train")
    np.testing.assert_array_equal(train[path.stem][1], ROAD_SCENE)


def test_the_colours_are_those_of_the_development_kit():
    kit = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    assert [voc._colour(index) for index in range(6)] == kit
    assert voc._colour(15) == (192, 128, 128) and voc._colour(20) == (0, 64, 128)
    assert voc._colour(255) == (224, 224, 192)
