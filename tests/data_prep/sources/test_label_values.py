"""`labels` and `void` of source "folder" map the values of label maps to classes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_prep.pack import pack
from data_prep.settings import VOID, parse_dataset
from data_prep.shards.reader import SplitReader
from hpc.cli import UserError
from pipeline.planning.preflight import require_packed


@pytest.fixture
def masks(tmp_path):
    """Write images with label maps of the given values, and return their settings."""

    def write(values, val=None, **table):
        for split, found in (("train", values), ("val", val or values)):
            picks = np.resize(np.array(found, np.uint8), (20, 30))
            for folder, array in (
                (split, np.zeros((20, 30, 3), np.uint8)),
                (f"{split}annot", picks),
            ):
                (tmp_path / folder).mkdir(exist_ok=True)
                Image.fromarray(array).save(tmp_path / folder / f"{split}.png")
        paths = {"source": "folder", "root": str(tmp_path), "shards": str(tmp_path / "shards")}
        return parse_dataset("roads", {**paths, **table}, "grid.toml")

    return write


def refusal(settings) -> str:
    with pytest.raises(UserError) as refused:
        pack("roads", settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


REMEDY = (
    'map the label values to classes, such as labels = {0 = "background", 255 = "road"}, choose '
    "another void = VALUE, or correct the label maps"
)


@pytest.mark.parametrize(
    ("split", "values"),
    [
        ("train", {"values": (0, 255), "val": (0, 1)}),
        ("val", {"values": (0, 1), "val": (0, 255, 255)}),
    ],
)
def test_a_split_with_pixels_of_one_class_is_refused(masks, split, values):
    """With masks of 0 and 255, the default void would ignore the foreground."""
    share = {"train": 50.0, "val": 66.7}[split]
    assert refusal(masks(**values, classes=["background", "road"])) == (
        f"'background' (label value 0) is the only class with pixels in {split} of the data set "
        f"'roads'; {share} % of the pixels are void (label value 255); at least two are needed: "
        f"{REMEDY}"
    )


def test_packed_data_with_one_class_are_refused_for_training(masks):
    settings = masks((0, 1), classes=["background", "road"])
    manifest = pack("roads", settings)
    for half in manifest.splits.values():
        object.__setattr__(half.shards[0], "class_pixels", (0, 600))
    manifest.save()
    expected = "'road' (label value 1) is the only class with pixels in train of the data set"
    with pytest.raises(UserError, match=expected.replace("(", r"\(").replace(")", r"\)")):
        require_packed("roads", settings)
    assert expected in refusal(settings)  # what is packed already is looked at too


@pytest.mark.parametrize(
    ("table", "values", "classes", "expected"),
    [
        ({"labels": {"0": "background", "255": "road"}}, (0, 255), "background road", (0, 1)),
        ({"labels": {"255": "road", "0": "background"}}, (0, 255), "road background", (1, 0)),
        ({"labels": {"1": "wall", "2": "floor"}, "void": 0}, (0, 1, 2), "wall floor", (VOID, 0, 1)),
        (
            {"labels": {"7": "road", "8": "walk", "9": "road"}, "void": [0, 255]},
            (0, 7, 8, 9, 255),
            "road walk",
            (VOID, 0, 1, 0, VOID),
        ),
        ({"labels": {"7": "a", "9": "b"}}, (7, 9, 255), "a b", (0, 1, VOID)),
        (
            {"labels": {"7": "a", "9": "b"}, "classes": ["b", "a"]},
            (7, 9),
            "b a",
            (1, 0),
        ),
        ({"classes": ["a", "b"], "void": [2, 11]}, (0, 1, 2, 11), "a b", (0, 1, VOID, VOID)),
    ],
)  # fmt: skip
def test_values_become_classes(masks, table, values, classes, expected):
    settings = masks(values, **table)
    manifest = pack("roads", settings)
    assert manifest.classes == tuple(classes.split())
    label = SplitReader(manifest, "train").label(0)
    np.testing.assert_array_equal(label, np.resize(np.array(expected, np.uint8), (20, 30)))
    again = parse_dataset("roads", settings.model_dump(), "g")
    assert again.identity() == settings.identity()


@pytest.mark.parametrize(
    ("table", "value", "expected"),
    [
        ({"labels": {"0": "a", "255": "b"}}, 7, "classes are 0, 255 and no void"),
        ({"labels": {"1": "a", "2": "b", "4": "c"}, "void": [0, 255]}, 9,
         "classes are 1 to 2, 4 and void is 0, 255"),
        ({"labels": {"1": "a", "2": "b"}, "void": 0}, 255, "classes are 1 to 2 and void is 0"),
    ],
)  # fmt: skip
def test_a_value_that_is_neither_listed_nor_void_is_refused(masks, table, value, expected):
    known = [int(key) for key in table["labels"]]
    message = refusal(masks((*known, value), **table))
    assert f"trainannot/train.png holds the label value {value}, but {expected}; correct" in message


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({}, "the key 'classes' is missing; list them, or map values with labels"),
        ({"labels": {}}, "the key 'classes' is missing"),
        ({"labels": {"0": "a"}}, "classes must name 2 to 255 classes"),
        ({"labels": {"0": "a", "1": "a"}}, "classes must name 2 to 255 classes"),
        ({"labels": {"0": "a", "256": "b"}}, "labels: '256' is not a value of a label map, 0 to"),
        ({"labels": {"0": "a", "-1": "b"}}, "labels: '-1' is not a value of a label map"),
        ({"labels": {"0": "a", "01": "b"}}, "labels: '01' is not a value of a label map"),
        ({"labels": {"0": "a", "road": "b"}}, "labels: 'road' is not a value of a label map"),
        ({"labels": {"0": "a", "9" * 5000: "b"}}, "is not a value of a label map"),
        ({"labels": {"0": "a", "1": 7}}, "labels.1: Input should be a valid string, not 7"),
        ({"labels": ["a", "b"]}, "labels: Input should be a valid table"),
        ({"labels": {"0": "void", "1": "a", "2": "b"}},
         "labels: void is not a class; remove 0 from labels and set void = [0]"),
        ({"labels": {"0": "a", "1": "b"}, "void": 1}, "1 is both void and a class in labels"),
        ({"labels": {"0": "a", "1": "b"}, "void": [1, 2]}, "1 is both void and a class in labels"),
        ({"labels": {"0": "a", "1": "rode"}, "classes": ["a", "road"]},
         "labels: 'rode' is not one of classes; did you mean 'road'?"),
        ({"labels": {"0": "a", "1": "b"}, "classes": ["a", "b", "c"]},
         "labels maps no value to the class 'c' of classes"),
        ({"labels": {"0": "a", "1": "b"}, "classes": ["a", "b", "b"]}, "classes must be distinct"),
        ({"classes": ["a", "b"], "void": [255, 1]}, "void = 1 is the index of a class"),
        ({"classes": ["a", "b"], "void": 256}, "void: Input should be less than or equal to 255"),
    ],
)  # fmt: skip
def test_contradictory_labels_are_refused_in_one_line(table, expected):
    with pytest.raises(UserError) as refused:
        parse_dataset("roads", {"source": "folder", "root": "x", **table}, "grid.toml")
    message = str(refused.value)
    assert message.startswith("grid.toml: [dataset.roads]: ") and expected in message
    assert "\n" not in message


def identity(**table) -> str:
    return parse_dataset("roads", {"source": "folder", "root": "x", **table}, "g").identity()


def test_labels_change_the_identity():
    plain = identity(classes=["a", "b"])
    mapped = identity(labels={"0": "a", "255": "b"})
    assert plain != mapped != identity(labels={"255": "b", "0": "a"})
    assert mapped == identity(labels={"255": "b", "0": "a"}, classes=["a", "b"], void=[])
