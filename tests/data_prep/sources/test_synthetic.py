"""Drawn street scenes are reproducible and show all classes, with areas far apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.pack import pack
from data_prep.settings import parse_dataset
from data_prep.sources import synthetic
from data_prep.sources.scenes import CLASSES, draw_scene


def _settings(folder: Path, **table):
    return parse_dataset(
        "streets", {"source": "synthetic", "shards": str(folder), **table}, "g.toml"
    )


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    settings = _settings(tmp_path_factory.mktemp("streets"), train=100, val=40)
    return settings, pack("streets", settings)


def test_eight_classes_whose_areas_span_three_orders_of_magnitude(streets):
    _, manifest = streets
    assert manifest.classes == CLASSES and len(CLASSES) == 8
    pixels = np.array(manifest.splits["train"].class_pixels)
    share = np.sort(pixels / pixels.sum())
    assert 0.35 < share[-1] < 0.42
    assert 0.0004 < share[0] < 0.0008
    assert (np.diff(share) > 0).all()
    assert 0 < manifest.splits["train"].void_pixels < 0.05 * pixels.sum()


def test_every_class_is_in_both_splits_and_a_sign_is_large_enough_to_see(streets):
    settings, manifest = streets
    assert min(manifest.splits["val"].class_pixels) > 0
    sign = CLASSES.index("sign")
    with_sign = 0
    for sample in synthetic.samples(settings, "val"):
        label = synthetic.read_label(settings, sample)
        rows, columns = np.nonzero(label == sign)
        if rows.size:
            with_sign += 1
            assert np.ptp(rows) >= 9 and np.ptp(columns) >= 9
    assert with_sign == 4


def test_the_files_are_jpeg_and_png_like_a_real_data_set(streets):
    settings, manifest = streets
    sample = synthetic.samples(settings, "train")[0]
    with Image.open(sample.image) as image, Image.open(sample.label) as label:
        assert (image.format, image.size, label.format, label.mode) == (
            "JPEG",
            (192, 128),
            "PNG",
            "L",
        )
    assert manifest.splits["train"].images == 100
    assert manifest.splits["train"].shards[0].ids[:2] == ("train_000000", "train_000001")


def test_a_scene_depends_on_seed_split_and_index_alone(tmp_path):
    seen = [draw_scene(seed, split, index, (64, 96)) for seed, split, index in
            ((0, 0, 3), (0, 0, 3), (0, 0, 4), (0, 1, 3), (-5, 0, 3))]  # fmt: skip
    pictures = [hashlib.sha256(picture.tobytes()).hexdigest() for picture, _ in seen]
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 4

    few, more = (
        _settings(tmp_path / "few", train=2, val=1),
        _settings(tmp_path / "more", train=4, val=1),
    )
    for settings in (few, more):
        synthetic.prepare(settings)
    for one, other in zip(
        synthetic.samples(few, "train"), synthetic.samples(more, "train"), strict=False
    ):
        assert one.image.read_bytes() == other.image.read_bytes()


@pytest.mark.parametrize("size", [(32, 32), (33, 200), (240, 100)])
def test_any_size_can_be_drawn(size):
    for index in range(12):
        picture, label = draw_scene(1, 0, index, size)
        assert picture.shape == (*size, 3) and label.shape == size
        assert set(np.unique(label)) <= {*range(8), 255}


def test_files_are_drawn_once_and_again_when_the_settings_change(tmp_path):
    settings = _settings(tmp_path, train=2, val=1)
    synthetic.prepare(settings)
    first = synthetic.samples(settings, "train")[0].image
    before = first.stat().st_mtime_ns
    synthetic.prepare(settings)
    assert first.stat().st_mtime_ns == before
    synthetic.prepare(_settings(tmp_path, train=2, val=1, seed=1))
    assert first.stat().st_mtime_ns > before
