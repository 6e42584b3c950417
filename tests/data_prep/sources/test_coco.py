"""COCO 2017 from its official layout: polygons, crowds, overlaps, left-out images, and stamps."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest

from data_prep.pack import pack
from data_prep.packing.pack_shard import pack_shard
from data_prep.packing.shard_plan import find_source, plan_shards
from data_prep.sources import coco
from hpc.cli import UserError
from tests.data_prep.sources import trees
from tests.data_prep.sources.trees import crowd, rectangle

# the order in which torchvision's segmentation references list COCO's ids for VOC's classes
TORCHVISION_IDS = [0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]
PERSON, CAR, GIRAFFE = 1, 3, 25
SIZE = (61, 83)
CAR_AT_LEFT = rectangle(CAR, 0, 0, 10, 10)
HERD = np.zeros(SIZE, bool)
HERD[2:40, 3:50] = True
HERD[10, 10] = False


@pytest.fixture
def tree(tmp_path):
    """Training: cars that touch, a crowd, a grey image, small objects, none. Validation: all."""
    far = rectangle(CAR, 0, 0, 30, 40)
    train = {
        "000000000009": (SIZE, [far, rectangle(PERSON, 30, 40, 61, 83)]),
        "000000000025": (SIZE, [crowd(PERSON, HERD)]),
        "000000000030": (SIZE, [rectangle(CAR, 0, 0, 25, 40)]),  # 1000 pixels
        "000000000034": (SIZE, [rectangle(GIRAFFE, 0, 0, 60, 60)]),
        "000000000036": (SIZE, []),
        "000000000042": (SIZE, [rectangle(CAR, 0, 0, 20, 40), rectangle(CAR, 30, 0, 31, 83)] * 2),
    }
    val = {
        "000000000139": (SIZE, [rectangle(72, 1, 1, 5, 5)]),
        "000000000285": (SIZE, [rectangle(GIRAFFE, 0, 0, 60, 60)]),
    }
    trees.coco(tmp_path, train=train, val=val)
    return tmp_path


def labels(root, split="train") -> dict[str, np.ndarray]:
    packed = trees.Packed(pack("coco", trees.settings("coco", root)))
    return {one: label for one, (_, label) in packed.split(split).items()}


def drawn(root, *objects, size=SIZE) -> np.ndarray:
    """Return the label map of a validation image with these objects."""
    trees.coco(root, val={"000000000139": (size, list(objects))})
    return labels(root, "val")["000000000139"]


def refusal(root) -> str:
    with pytest.raises(UserError) as refused:
        pack("coco", trees.settings("coco", root))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_categories_become_vocs_classes_as_in_torchvisions_references(tree):
    for index, category in enumerate(TORCHVISION_IDS[1:], 1):
        assert drawn(tree, rectangle(category, 3, 5, 20, 30))[4, 6] == index
    assert pack("coco", trees.settings("coco", tree)).classes[20] == "tvmonitor"


def test_polygons_cover_their_pixels_and_all_else_is_background(tree):
    expected = np.zeros(SIZE, np.uint8)
    expected[:30, :40] = 7
    expected[30:, 40:] = 15
    np.testing.assert_array_equal(labels(tree)["000000000009"], expected)


def test_an_object_of_several_polygons_is_all_of_them(tree):
    left, right = rectangle(CAR, 3, 5, 20, 30), rectangle(CAR, 40, 60, 50, 83)
    left["segmentation"] += right["segmentation"]
    expected = np.zeros(SIZE, np.uint8)
    expected[3:20, 5:30] = 7
    expected[40:50, 60:83] = 7
    np.testing.assert_array_equal(drawn(tree, left), expected)


def test_polygons_of_one_object_may_overlap(tree):
    one = rectangle(CAR, 3, 5, 20, 30)
    one["segmentation"] *= 2
    assert set(np.unique(drawn(tree, one))) == {0, 7}


def test_the_run_lengths_of_a_crowd_go_down_the_columns(tree):
    np.testing.assert_array_equal(labels(tree)["000000000025"], np.where(HERD, 15, 0))


def test_a_crowd_whose_first_pixel_is_set(tree):
    mask = np.zeros(SIZE, bool)
    mask[:2, :1] = True
    np.testing.assert_array_equal(drawn(tree, crowd(PERSON, mask)), np.where(mask, 15, 0))


def compressed(mask: np.ndarray) -> dict[str, object]:
    """Return the run lengths of `mask` as text, as other tools than COCO's own write them."""
    rle = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"counts": rle["counts"].decode(), "size": list(mask.shape)}


def test_run_lengths_may_be_compressed(tree):
    herd = {**crowd(PERSON, HERD), "segmentation": compressed(HERD)}
    np.testing.assert_array_equal(drawn(tree, herd), np.where(HERD, 15, 0))


@pytest.mark.parametrize("first", [PERSON, CAR])
def test_pixels_of_two_objects_are_void_whatever_their_classes_and_order(tree, first):
    herd = crowd(first, HERD)
    expected = np.where(HERD, {PERSON: 15, CAR: 7}[first], 0)
    expected[30:60, 30:70] = 7
    expected[30:40, 30:50] = 255
    car = rectangle(CAR, 30, 30, 60, 70)
    np.testing.assert_array_equal(drawn(tree, herd, car), expected)
    np.testing.assert_array_equal(drawn(tree, car, herd), expected)
    third = rectangle(PERSON, 35, 35, 36, 36)  # on what two cover already
    np.testing.assert_array_equal(drawn(tree, car, herd, third), expected)


def test_other_categories_cover_nothing(tree):
    label = drawn(tree, rectangle(CAR, 0, 0, 10, 10), rectangle(GIRAFFE, 5, 5, 60, 60))
    assert (label[:10, :10] == 7).all() and (label == 7).sum() == 100


@pytest.mark.parametrize("segmentation", [[], None, [[]], [[5.0, 3.0, 30.0, 20.0]]])
def test_the_box_of_an_object_without_a_polygon_is_void(tree, segmentation):
    bare = {**rectangle(PERSON, 3, 5, 20, 30), "segmentation": segmentation}
    bare["bbox"] = [4.5, 2.5, 25.0, 17.0]
    expected = np.zeros(SIZE, np.uint8)
    expected[:10, :10] = 7
    expected[2:20, 4:30] = 255
    np.testing.assert_array_equal(drawn(tree, rectangle(CAR, 0, 0, 10, 10), bare), expected)
    bare.pop("segmentation")
    np.testing.assert_array_equal(drawn(tree, rectangle(CAR, 0, 0, 10, 10), bare), expected)


def test_training_leaves_out_pictures_with_a_thousand_pixels_or_less_of_vocs_classes(tree):
    assert list(labels(tree)) == ["000000000009", "000000000025", "000000000042"]


def test_validation_keeps_every_picture(tree):
    found = labels(tree, "val")
    assert list(found) == ["000000000139", "000000000285"]
    assert not found["000000000285"].any()


def test_images_are_the_jpegs_own_and_grey_ones_are_read(tree):
    packed = trees.Packed(pack("coco", trees.settings("coco", tree))).split("train")
    image, _ = packed["000000000009"]
    assert (image == image[..., :1]).all() and image.std() > 0
    assert image.shape == (*SIZE, 3)


def _touch(path):
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))


def test_changed_annotations_change_the_stamp_of_their_shard_only(tree):
    settings = trees.settings("coco", tree)

    def stamps():
        return {plan.split: plan.stamp for plan in plan_shards(find_source(settings)).shards}

    before = stamps()
    path = tree / "annotations/instances_val2017.json"
    _touch(path)
    assert stamps() == before
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"][0][0] += 1
    path.write_text(json.dumps(content))
    after = stamps()
    assert after["val"] != before["val"] and after["train"] == before["train"]


def test_packing_again_after_a_change_gives_the_new_label_maps(tree):
    assert drawn(tree, rectangle(CAR, 0, 0, 10, 10))[5, 5] == 7
    assert drawn(tree, rectangle(PERSON, 0, 0, 10, 10))[5, 5] == 15


def test_a_large_annotation_file_is_parsed_once_for_all_its_pictures(tree, monkeypatch):
    read = []
    real = json.loads
    monkeypatch.setattr(coco.json, "loads", lambda text: read.append(len(text)) or real(text))
    pack("coco", trees.settings("coco", tree), processes=1)
    files = [
        (tree / f"annotations/instances_{s}2017.json").stat().st_size for s in ("train", "val")
    ]
    assert [read.count(size) for size in files] == [1, 1]
    assert len(read) == 2 + 3 + 2  # and what the files say of each picture


def test_packing_a_shard_needs_no_annotation_file(tree):
    plans = plan_shards(find_source(trees.settings("coco", tree))).shards
    sent = pickle.loads(pickle.dumps(plans[1]))  # to another process
    for path in (tree / "annotations").iterdir():
        path.unlink()
    Path(sent.settings.shards).mkdir(parents=True)
    summary = pack_shard(sent, skip_bad=False).summary
    assert summary.ids == ("000000000139", "000000000285") and summary.class_pixels[20] == 16


def test_without_pycocotools_one_line_says_what_to_install(tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert "which is not installed; pip install 'pycocotools" in refusal(tree)


def test_an_image_that_the_annotations_name_is_missing(tree):
    (tree / "train2017/000000000025.jpg").unlink()
    message = refusal(tree)
    assert "train2017 has no 000000000025.jpg, which " in message
    assert "instances_train2017.json asks for" in message


def test_a_root_without_coco_names_the_download(tmp_path):
    message = refusal(tmp_path)
    assert "annotations/instances_train2017.json: No such file or directory" in message
    assert "annotations_trainval2017.zip of https://cocodataset.org/#download" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is truncated or not JSON ("),
        ('{"images": [', "is truncated or not JSON ("),
        ("\xff", "is truncated or not JSON ("),
        ("[]", "does not hold the instances of COCO ("),
        ('{"images": [], "annotations": []}', "of COCO (KeyError: 'categories')"),
        ('{"images": [], "annotations": [], "categories": []}', "of COCO (KeyError: 'airplane')"),
    ],
)
def test_damaged_or_other_annotations_are_refused(tree, text, reason):
    path = tree / "annotations/instances_train2017.json"
    path.write_text(text, encoding="latin-1")
    message = refusal(tree)
    assert "/instances_train2017.json " in message and reason in message


@pytest.mark.parametrize(
    "segmentation",
    [
        {"counts": [3, 4], "size": [61, 83]},
        {"counts": [61 * 83], "size": [83, 61]},
        {"counts": [0, -1, 61 * 83 + 1], "size": [61, 83]},
        {"counts": "nonsense", "size": [61, 83]},
        compressed(HERD[10:11]),  # of another size
        {},
        7,
        [[1e6, 0, 5, 0, 5, 5]],
        [[float("nan"), 0, 5, 0, 5, 5]],
        [["a", "b", "c", "d", "e", "f"]],
    ],
)
def test_an_outline_that_cannot_be_drawn_is_a_bad_file_of_one_picture(tree, segmentation):
    bad = {**rectangle(CAR, 0, 0, 50, 50), "segmentation": segmentation}
    trees.coco(tree, val={"000000000139": (SIZE, [bad]), "000000000285": (SIZE, [CAR_AT_LEFT])})
    message = refusal(tree)
    assert "instances_val2017.json: the annotation of 000000000139.jpg cannot be drawn (" in message
    manifest = pack("coco", trees.settings("coco", tree), skip_bad=True)
    assert list(trees.Packed(manifest).split("val")) == ["000000000285"]


def test_a_picture_of_another_size_than_its_annotations_say(tree):
    trees.picture(tree / "val2017/000000000285.jpg", (60, 83))
    message = refusal(tree)
    assert "000000000285.jpg is 83 x 60 but its label map" in message
    assert "instances_val2017.json is 83 x 61 (width x height)" in message


PATH = "{root}/annotations/instances_train2017.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content["images"].append({**content["images"][0], "id": 7}),
            f"two entries of 'images' in {PATH} have the stem of file_name '000000000009'; remove",
        ),
        (
            lambda content: content["images"].append(
                {**content["images"][0], "id": 7, "file_name": "000000000009.png"}
            ),
            f"two entries of 'images' in {PATH} have the stem of file_name '000000000009'; remove",
        ),
        (
            lambda content: content["images"].append(
                {**content["images"][0], "file_name": "000000000010.jpg"}
            ),
            f"two entries of 'images' in {PATH} have the id 9; remove one of them",
        ),
        (
            lambda content: content["images"].pop(0),
            f"2 annotations in {PATH} have the image_id 9, which 'images' does not list; remove",
        ),
        (
            lambda content: [one.update(image_id=str(one["image_id"]))
                             for one in content["annotations"]],
            f"9 annotations in {PATH} have the image_id '9', but the id in 'images' is 9; write",
        ),
        (
            lambda content: content["annotations"].extend(content["annotations"][:1]),
            f"two entries of 'annotations' in {PATH} have the image_id and id (9, 0); remove",
        ),
        (
            lambda content: content["annotations"][0].update(category_id="3"),
            f"1 annotations in {PATH} have the category_id '3', but the id in 'categories' is 3",
        ),
        (
            lambda content: content["annotations"][0].update(category_id=99),
            f"1 annotations in {PATH} have the category_id 99, which 'categories' does not list",
        ),
        (
            lambda content: content["categories"].append({"id": 99, "name": "car"}),
            f"two entries of 'categories' in {PATH} have the name 'car'; remove one of them",
        ),
        (
            lambda content: content["categories"].append({"id": 3, "name": "cart"}),
            f"two entries of 'categories' in {PATH} have the id 3; remove one of them",
        ),
    ],
)  # fmt: skip
def test_entries_that_would_be_lost_or_count_twice_are_refused(tree, change, message):
    path = tree / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert refusal(tree).startswith(message.format(root=tree))
