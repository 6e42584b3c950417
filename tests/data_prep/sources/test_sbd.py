"""SBD from its official layout: .mat files, its own lists, and VOC's validation kept out."""

from __future__ import annotations

import numpy as np
import pytest
from torchvision.datasets import SBDataset

from data_prep.pack import pack
from data_prep.packing.shard_plan import find_source
from hpc.cli import UserError
from tests.data_prep.sources import trees

COW = np.zeros((31, 47), np.uint8)
COW[10:, :20] = 10
TABLE = np.full((60, 20), 11, np.uint8)
CAT = np.eye(25, dtype=np.uint8) * 8
BIRD = np.full((8, 8), 3, np.uint8)
BIRD[0] = 0
LABELS = {
    "2008_000003": COW,
    "2008_000009": TABLE,
    "2009_000001": CAT,
    "2010_000002": BIRD,
    "2011_000007": BIRD,
}
LISTS = {
    "train": "2008_000003\r\n2009_000001\r\n2008_000009",
    "val": "2010_000002\n2011_000007\n",
}


@pytest.fixture
def tree(tmp_path):
    trees.sbd(tmp_path, LABELS, grey=["2009_000001"], **LISTS)
    return tmp_path


@pytest.fixture
def voc(tree):
    """VOC beside it: two of VOC's validation images are SBD's, one is not."""
    borders = np.where(CAT == 8, 255, CAT).astype(np.uint8)
    labels = {"2009_000001": borders, "2007_000032": BIRD, "2008_000009": TABLE}
    home = trees.voc(tree, labels, train="2007_000032", val="2009_000001\n2007_000032\n")
    (home / "ImageSets/Main/val.txt").write_text("2009_000001\n2007_000032\n2010_000002\n")
    return {"voc_root": str(tree)}


def ids(root, **table) -> dict[str, list[str]]:
    found = find_source(trees.settings("sbd", root, **table)).samples
    return {split: [one.id for one in samples] for split, samples in found.items()}


def refusal(root, **table) -> str:
    with pytest.raises(UserError) as refused:
        pack("sbd", trees.settings("sbd", root, **table))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_label_maps_are_the_segmentation_of_the_mat_files(tree):
    manifest = pack("sbd", trees.settings("sbd", tree))
    packed = trees.Packed(manifest)
    train, val = packed.split("train"), packed.split("val")
    assert list(train) == ["2008_000003", "2008_000009", "2009_000001"]
    assert list(val) == ["2010_000002", "2011_000007"]
    for one, (_, label) in (train | val).items():
        np.testing.assert_array_equal(label, LABELS[one])
    assert manifest.splits["train"].void_pixels == 0
    assert len(manifest.classes) == 21 and manifest.classes[10] == "cow"


def test_torchvision_reads_the_same_from_the_same_tree(tree):
    packed = trees.Packed(pack("sbd", trees.settings("sbd", tree))).split("train")
    home = tree / "benchmark_RELEASE/dataset"
    theirs = SBDataset(str(home), image_set="train", mode="segmentation")
    assert len(theirs) == 3
    for (image, target), name in zip(theirs, theirs.images, strict=True):
        ours = packed[name.rsplit("/", 1)[-1][:-4]]
        np.testing.assert_array_equal(ours[0], np.asarray(image.convert("RGB")))
        np.testing.assert_array_equal(ours[1], np.asarray(target))


def test_train_noval_is_all_of_sbd_but_what_voc_validates_on(tree, voc):
    found = ids(tree, train="train_noval", **voc)["train"]
    assert found == ["2008_000003", "2008_000009", "2011_000007"]


def test_a_published_train_noval_goes_before_a_computed_one(tree, voc):
    (tree / "benchmark_RELEASE/dataset/train_noval.txt").write_text("2008_000003\n")
    assert ids(tree, train="train_noval", **voc)["train"] == ["2008_000003"]
    assert ids(tree, train="train_noval")["train"] == ["2008_000003"]


def test_train_noval_without_voc_says_what_it_needs(tree):
    message = refusal(tree, train="train_noval")
    assert "'train_noval' needs VOC 2012: set voc_root to the folder that holds" in message
    assert "or put train_noval.txt into " in message


def test_voc_val_validates_on_vocs_own_label_maps(tree, voc):
    manifest = pack("sbd", trees.settings("sbd", tree, train="train_noval", val="voc_val", **voc))
    val = trees.Packed(manifest).split("val")
    assert list(val) == ["2007_000032", "2009_000001"]
    np.testing.assert_array_equal(val["2009_000001"][1], np.where(CAT == 8, 255, 0))
    others = str(tree / "shards" / "other")
    path = tree / "VOCdevkit/VOC2012/SegmentationClass/2009_000001.png"
    trees.compacted(path)
    assert f"{path}: palette entry 1 is the colour (224, 224, 192), not" in refusal(
        tree, val="voc_val", shards=others, **voc
    )
    assert "'voc_val' needs VOC 2012" in refusal(tree, val="voc_val", shards=others)


def test_a_wrong_voc_root_is_refused_at_once(tree):
    message = refusal(tree, voc_root=str(tree / "lost"))
    assert "lost/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt: No such file" in message


def test_the_place_of_voc_changes_no_identity(tree, voc):
    plain, beside = trees.settings("sbd", tree), trees.settings("sbd", tree, **voc)
    assert plain.identity() == beside.identity()


def test_a_list_of_the_user(tree):
    (tree / "mine.txt").write_text("2010_000002\n")
    assert ids(tree, train=str(tree / "mine.txt"))["train"] == ["2010_000002"]
    assert "has no list 'trainval'" in refusal(tree, train="trainval")


def test_a_missing_label_map_and_a_missing_image(tree):
    home = tree / "benchmark_RELEASE/dataset"
    (home / "cls/2009_000001.mat").unlink()
    message = refusal(tree)
    assert "cls has no 2009_000001.mat, which the list 'train' asks for; " in message
    (home / "img/2008_000009.jpg").unlink()
    assert "img has no 2008_000009.jpg, which the list 'train' asks for" in refusal(tree)


def test_a_root_without_sbd_names_the_download(tmp_path):
    message = refusal(tmp_path)
    assert "benchmark_RELEASE/dataset: No such file" in message
    assert "benchmark.tgz of http://home.bharathh.info/pubs/codes/SBD/" in message


def test_a_damaged_or_other_mat_file_is_refused(tree):
    path = tree / "benchmark_RELEASE/dataset/cls/2009_000001.mat"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"no matlab", b""):
        path.write_bytes(damaged)
        assert "2009_000001.mat cannot be read as a label map of SBD" in refusal(tree)
    trees.mat(path, GTinst={"Segmentation": CAT})
    assert "2009_000001.mat cannot be read as a label map of SBD" in refusal(tree)
    trees.mat(path, GTcls={"Segmentation": CAT.astype(float)})
    assert "GTcls.Segmentation is float64 of 2 dimensions, not uint8 of 2" in refusal(tree)


@pytest.mark.parametrize("value", [21, 255])
def test_a_label_beyond_the_classes_is_no_void_here(tree, value):
    label = np.where(CAT == 8, value, 0).astype(np.uint8)
    trees.sbd(tree, {"2009_000001": label})
    assert f"holds the label value {value}, but classes are 0 to 20 and no void" in refusal(tree)


def test_an_image_of_both_lists_is_one_sample_of_train_noval(tree, voc):
    (tree / "benchmark_RELEASE/dataset/val.txt").write_text("2008_000003\n2011_000007\n")
    found = ids(tree, train="train_noval", **voc)["train"]
    assert found == ["2008_000003", "2008_000009", "2011_000007"]
