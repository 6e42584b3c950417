"""After any damage to a shard, `verify` names the file; a reader names file and sample, or gives
back what was packed; what the damage did not touch stays readable."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from data_prep.pack import pack
from data_prep.settings import parse_dataset
from data_prep.shards.manifest import Manifest, ShardSummary
from data_prep.shards.reader import ShardFile
from data_prep.verify import verify
from hpc.storage.atomic import Damaged
from tests.fuzz.cases import fuzzed
from tests.fuzz.damage import DAMAGES

DATA_SETS = 16
Sample = tuple[np.ndarray, np.ndarray]


class Packed:
    """A small data set of random images, packed, and what its shards hold."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        for split in ("train", "val"):
            for stem in self._random.choice(list("abÄç %\n"), self._random.integers(1, 5), False):
                self._draw(folder / split, folder / f"{split}annot", stem)
        table = {"source": "folder", "root": str(folder), "shards": str(folder / "shards")}
        table |= {"classes": ["a", "b", "c"], "codec": ["auto", "raw"][seed % 2]}
        self.manifest: Manifest = pack("d", parse_dataset("d", table, "grid.toml"), processes=1)
        self.halves = {
            split: replace(self.manifest, splits={split: half})
            for split, half in self.manifest.splits.items()
        }
        self.content = {split: self._read(split) for split in self.manifest.splits}

    def _draw(self, images: Path, labels: Path, stem: str) -> None:
        for folder in (images, labels):
            folder.mkdir(parents=True, exist_ok=True)
        size = (int(self._random.integers(1, 200)), int(self._random.integers(1, 12)))
        suffix = self._random.choice([".png", ".jpg"])
        pixels = self._random.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{stem}{suffix}")
        Image.fromarray(self._random.choice(np.array([0, 1, 2, 255], np.uint8), size)).save(
            labels / f"{stem}.png"
        )

    def shard(self, split: str) -> tuple[Path, ShardSummary]:
        [summary] = self.manifest.splits[split].shards
        return self.manifest.folder / summary.file, summary

    def _read(self, split: str) -> tuple[bytes, list[Sample], list[list[range]]]:
        """The file's bytes, its samples, and which of the bytes are a sample's."""
        path, summary = self.shard(split)
        shard = ShardFile(path, summary)
        samples = [(shard.image(k), shard.label(k)) for k in range(summary.images)]
        with h5py.File(path) as file:
            index = file["index"][:]
            begins = [file[arena].id.get_offset() for arena in ("pixels", "labels")]
        places = []
        for row in index:
            sizes = int(row["pixels_size"]), int(row["height"]) * int(row["width"])
            offsets = int(row["pixels_offset"]), int(row["labels_offset"])
            firsts = [begin + offset for begin, offset in zip(begins, offsets, strict=True)]
            places.append([range(a, a + n) for a, n in zip(firsts, sizes, strict=True)])
        return path.read_bytes(), samples, places


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    """The data set of a number, packed when it is first asked for."""
    return cache(lambda seed: Packed(tmp_path_factory.mktemp("packed"), seed))


@fuzzed(
    0.3,
    seed=st.integers(0, DATA_SETS - 1),
    split=st.sampled_from(["train", "val"]),
    damage=DAMAGES | st.integers(0, DATA_SETS - 1),
)
def test_a_damaged_shard_is_named_or_gives_what_was_packed(data_sets, seed, split, damage):
    packed = data_sets(seed)
    path, summary = packed.shard(split)
    whole, samples, places = packed.content[split]
    # a number: the other split's shard, or another data set's, under this name
    other = {"train": "val", "val": "train"}[split]
    found = data_sets(damage).content[other][0] if isinstance(damage, int) else damage(whole)
    path.write_bytes(found)
    try:
        problems = verify(packed.halves[split], processes=1)
        assert bool(problems) == (found != whole)
        assert all(str(path) in problem for problem in problems)
        try:
            shard = ShardFile(path, summary)
        except Damaged as error:
            assert str(path) in str(error) and found != whole
            return
        assert len(found) == len(whole)
        for k, expected in enumerate(samples):
            same = all(found[p.start : p.stop] == whole[p.start : p.stop] for p in places[k])
            check_sample(shard, k, summary.ids[k], expected, same, path)
    finally:
        path.write_bytes(whole)


def check_sample(
    shard: ShardFile, k: int, stem: str, expected: Sample, untouched: bool, path: Path
) -> None:
    try:
        read = shard.image(k), shard.label(k)
    except Damaged as error:
        assert not untouched
        assert str(path) in str(error) and repr(stem) in str(error)
        return
    assert untouched
    for one, packed in zip(read, expected, strict=True):
        np.testing.assert_array_equal(one, packed)
