"""CamVid, a data set of real photographs, if it lies beside the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.pack import pack
from data_prep.settings import parse_dataset
from data_prep.shards.reader import SplitReader

CAMVID = Path(__file__).parents[4] / "shared" / "camvid"
CLASSES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"]
CLASSES += ["pedestrian", "bicyclist"]


@pytest.mark.shared
@pytest.mark.skipif(not CAMVID.is_dir(), reason="no CamVid beside the repository")
def test_camvid_packs_whole_and_reads_back(tmp_path):
    table = {"source": "folder", "root": str(CAMVID), "shards": str(tmp_path)}
    settings = parse_dataset("camvid", {**table, "classes": CLASSES, "void": 11}, "grid.toml")
    manifest = pack("camvid", settings)

    train = manifest.splits["train"]
    assert (train.images, manifest.splits["val"].images) == (367, 101)
    share = dict(zip(CLASSES, np.array(train.class_pixels) / sum(train.class_pixels), strict=True))
    assert 0.30 < share["road"] < 0.34 and 0.002 < share["bicyclist"] < 0.004
    reader = SplitReader(manifest, "val")
    for i in range(0, len(reader), 10):
        photograph = CAMVID / "val" / f"{reader.id(i)}.jpg"
        np.testing.assert_array_equal(reader.image(i), np.asarray(Image.open(photograph)))
        source = np.asarray(Image.open(CAMVID / "valannot" / f"{reader.id(i)}.png"))
        np.testing.assert_array_equal(reader.label(i), np.where(source == 11, 255, source))
