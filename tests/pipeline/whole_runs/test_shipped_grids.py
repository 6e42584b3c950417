"""Each grid file of `configs/` runs from raw files to its whole table: only paths, sizes, numbers
of images, seeds and epochs are changed, heads are thin, and no loader processes read the images."""

from __future__ import annotations

import csv
import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet101, segmentation

from data_prep.weights import VOC_CLASSES, weights_path
from hpc.scheduler.job import ModuleCall
from jobs.models import build as networks
from jobs.models.build import seeded
from jobs.training import backbone
from pipeline import submit
from pipeline.config.grid_file import Grid, read_grid
from pipeline.paper.reference import paper_table
from pipeline.scores.results_file import read_results
from pipeline.submission import submitter
from tests.data_prep.sources import trees
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.stories import work

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[3] / "configs"
CAMVID = Path(__file__).parents[4] / "shared" / "camvid"
SPLITS, SIZE = {"train": 12, "val": 2}, (32, 40)
SMALLER = {
    **SPLITS,
    "seeds": [0],
    "epochs": 1,
    "resize": [17, 24],
    "crop": [17, 17],
    "eval_size": 17,
    "size": list(SIZE),
}
PROFILE = 'kind = "local"\n'


class InlineQueue(FakeQueue):
    """Runs jobs one after the other in this process, which has loaded torch already."""

    def submit(self, calls: Sequence[ModuleCall], *how: Any, **more: Any) -> list[str]:
        ids = super().submit(calls, *how, **more)
        work(self)
        return ids

    def ensure_runner(self) -> None:
        """Do nothing: no job waits."""


def thin_head(features: int, classes: int) -> nn.Module:
    """Return a head of one convolution in place of millions of weights a cell."""
    return nn.Conv2d(features, classes, 1)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[Path]:
    """Give torch a folder of weights: files of the published names with random numbers, whose hash
    is not that of their names."""
    home = tmp_path_factory.mktemp("torch")
    built = {"weights": None, "weights_backbone": None, "aux_loss": True}
    with pytest.MonkeyPatch.context() as patch, seeded("published"):
        patch.setenv("TORCH_HOME", str(home))
        patch.setattr(backbone, "check_published", lambda path: None)
        for weights, model, build in (
            ("imagenet", "fcn_resnet101", resnet101),
            ("pre-fine", "fcn_resnet101", lambda: segmentation.fcn_resnet101(**built)),
            ("pre-fine", "deeplabv3_resnet101", lambda: segmentation.deeplabv3_resnet101(**built)),
        ):
            path = weights_path(weights, model)
            path.parent.mkdir(parents=True, exist_ok=True)
            network = build()
            if weights == "pre-fine":
                network.classifier = thin_head(2048, VOC_CLASSES)
            torch.save(network.state_dict(), path)
        yield home


def run_small(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Grid:
    """Run `configs/NAME.toml` by `submit all`, smaller, in `folder`."""
    table = smaller(tomllib.loads((CONFIGS / f"{name}.toml").read_text()))
    table["run_dir"] = str(folder / "run")
    table["protocol"]["workers"] = 0
    for dataset, settings in table["dataset"].items():
        settings["shards"] = str(folder / "shards" / dataset)
        if "root" in settings:
            settings["root"] = str(folder / "raw" / dataset)
            raw_files(folder / "raw" / dataset, settings["source"])
    (folder / "grid.toml").write_text("".join(f"{key} = {toml(table[key])}\n" for key in table))
    (folder / "profile.toml").write_text(PROFILE)
    patch.setattr(networks, "_HEADS", dict.fromkeys(networks._HEADS, thin_head))
    patch.setattr(submitter, "check_room", lambda *_: "")  # whole heads would need 36 GB
    patch.setattr(submit, "open_queue", lambda *_, **__: InlineQueue(folder))
    arguments = [str(folder / "grid.toml"), "--wait", "--cluster", str(folder / "profile.toml")]
    assert submit.main(["all", *arguments]) == 0
    return read_grid(folder / "grid.toml")


def smaller(table: Any) -> Any:
    """`table` with the values of `SMALLER` in place of its own, wherever it has such a number."""
    if not isinstance(table, dict):
        return table
    return {
        key: SMALLER[key] if type(value) is type(SMALLER.get(key)) else smaller(value)
        for key, value in table.items()
    }


def toml(value: Any) -> str:
    """A value in TOML, tables inline."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {toml(one)}' for key, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value)


def raw_files(root: Path, source: str) -> None:
    """A data set of `source` as its archives unpack."""
    train, val = ([f"{split}_{k:06d}" for k in range(n)] for split, n in SPLITS.items())
    if source == "folder":  # the first of CamVid's own
        for name in ("train", "trainannot", "val", "valannot"):
            (root / name).mkdir(parents=True)
            for file in sorted((CAMVID / name).iterdir())[: SPLITS[name.removesuffix("annot")]]:
                (root / name / file.name).symlink_to(file)
    elif source == "cityscapes":
        drawn = ([f"aachen/{stem}" for stem in stems] for stems in (train, val))
        maps = (label_maps(stems, range(34)) for stems in drawn)
        trees.cityscapes(root, **dict(zip(SPLITS, maps, strict=True)))
    else:
        write = {"voc": trees.voc, "sbd": trees.sbd}[source]
        values = [*range(21), 255] if source == "voc" else range(21)
        lists = {"train": "\n".join(train), "val": "\n".join(val)}
        write(root, label_maps([*train, *val], values), **lists)


def label_maps(stems: Sequence[str], values: Sequence[int]) -> dict[str, np.ndarray]:
    """Label maps that hold all of `values`, another for each stem."""
    first = np.resize(np.array(values, np.uint8), SIZE)
    return {stem: np.roll(first, place) for place, stem in enumerate(stems)}


def expected_rows(grid: Grid) -> list[tuple[str, str, str]]:
    """Return the rows that the file asks for: pre-fine only for data sets with VOC's classes."""
    return [
        (dataset, model, loss.name)
        for dataset, model, loss in product(grid.datasets, grid.models, grid.losses)
        if loss.name != "pre-fine" or dataset in ("voc", "sbd")
    ]


def assert_table_is_whole(grid: Grid, rows: int) -> None:
    """Every row that the file asks for is in the table, in its order, with scores of its one seed
    on every validation image."""
    expected = expected_rows(grid)
    results = read_results(grid.run.results)
    assert results.record["missing"] == []
    with (grid.run.report / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["dataset"], row["model"], row["loss"]) for row in table] == expected
    assert len(expected) == rows
    for row in table:
        assert row["seeds"] == "1"
        for score in ("acc", "rec", "cal", "brier", "nll"):
            assert math.isfinite(float(row[f"{score}_mean"])), (row, score)
    for dataset in results.datasets:
        assert (dataset.counts["images"] == SPLITS["val"]).all()
    assert (grid.run.report / "index.html").is_file()


def test_the_papers_grid_has_the_rows_of_the_papers_table(published, tmp_path, monkeypatch):
    grid = run_small("paper", tmp_path, monkeypatch)
    assert_table_is_whole(grid, 100)
    with (grid.run.report / "table1.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(one["dataset"], one["model"], one["loss"]) for one in lines} == paper_table().keys()


def test_the_published_codes_grid(published, tmp_path, monkeypatch):
    assert_table_is_whole(run_small("published-code", tmp_path, monkeypatch), 100)


def test_the_demos_grid(tmp_path, monkeypatch):
    assert_table_is_whole(run_small("demo", tmp_path, monkeypatch), 8)


@pytest.mark.shared
@pytest.mark.skipif(not CAMVID.is_dir(), reason="no CamVid beside the repository")
def test_camvids_grid(tmp_path, monkeypatch):
    assert_table_is_whole(run_small("camvid", tmp_path, monkeypatch), 38)
