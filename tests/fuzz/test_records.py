"""A record, a table of counts or a file of weights is what was written, or one line that names the
file."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from data_prep.pack import pack
from data_prep.settings import parse_dataset
from data_prep.shards.manifest import MANIFEST, Manifest
from hpc.cli import UserError, one_line
from hpc.distributed.launcher import RankEnv
from hpc.distributed.process_group import process_group
from hpc.storage import checkpoint
from hpc.storage.atomic import read_json, write_json
from jobs.models.build import build_backbone, build_head
from jobs.spec.counts_file import read_counts, read_index, write_counts
from jobs.spec.run_paths import RunPaths
from jobs.spec.task import Task, read_task, write_task
from jobs.training.backbone import load_exactly, read_weights
from jobs.training.predictor import Predictor
from pipeline.scores.results_file import read_results
from pipeline.tracking.finished import finished_cells
from pipeline.tracking.submissions import submissions
from tests.fuzz.accidents import damaged
from tests.fuzz.cases import fuzzed
from tests.jobs.cells import a_cell
from tests.pipeline.scores import simulated

CELL = a_cell()
BACKBONE = "mobilenet_v3_large"


@dataclass(repr=False)
class Kind:
    """A kind of file: where it lies, how it is read, and what reading it whole gives."""

    path: Path
    read: Callable[[Path], Any]
    expected: Any = field(init=False)

    def __post_init__(self) -> None:
        self.expected = self.read(self.path)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """One file of each kind, and the process group that a predictor needs."""
    run = RunPaths(tmp_path_factory.mktemp("run"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    env = RankEnv("single", 0, 1, 0, node="here", job_id="", start_id="")
    with process_group(env, run.rendezvous) as group:
        yield {**records(run), **tables(run), **tensors(run, group)}
    torch.set_num_threads(before)


def records(run: RunPaths) -> dict[str, Kind]:
    """JSON with a checksum."""
    task = Task(kind="bundle", name="t", run=str(run.root), data="data", origin={}, cells=(CELL,))
    beat, failure = run.progress_of("t"), run.failure(CELL.signature)
    write_json(beat, {"stage": "training", "step": 3, "total": 90, "time": 1e9, "name": "grüße"})
    write_json(failure, {"cell": CELL.name, "step": 3, "reason": "the loss was nan at step 3"})
    sent = run.submitted / "1.json"
    job = {"task": "t", "kind": "bundle", "cells": [CELL.signature], "backbone": "", "job": "7"}
    write_json(sent, {"token": "1", "tasks": [job]})
    table = {"source": "synthetic", "shards": str(run.root / "data"), "train": 2, "val": 1}
    pack("streets", parse_dataset("streets", table, "grid.toml"), processes=1)
    return {
        "task": Kind(write_task(task), read_task),
        "heartbeat": Kind(beat, read_json),
        "failure": Kind(failure, read_json),
        "submission": Kind(sent, lambda path: list(submissions(run))),
        "manifest": Kind(run.root / "data" / MANIFEST, lambda path: Manifest.load(path.parent)),
    }


def tables(run: RunPaths) -> dict[str, Kind]:
    """Counts and results."""
    results = simulated.made_up_results(grid="grüße")
    simulated.write_results(run.results, results)
    path = run.counts_of("t", 1)
    cells = [{"signature": CELL.signature, "name": CELL.name, "backbone": ""}]
    arrays = {name: array[:1] for name, array in results.datasets[0].counts.items()}
    write_counts(path, cells, arrays, {"manifest": "0"})
    index = path.with_suffix(".json")
    return {
        "results": Kind(run.results, lambda path: asdict(read_results(path))),
        "counts": Kind(path, lambda path: read_counts(read_index(index))),
        "index": Kind(index, lambda path: read_counts(read_index(path))),
        "finished": Kind(index, lambda path: list(finished_cells(run)[0])),
    }


def tensors(run: RunPaths, group: Any) -> dict[str, Kind]:
    """Weights, and a trained head."""
    backbone = build_backbone(BACKBONE, 0, 0.1)
    new, old = run.root / "new.pth", run.root / "old.pth"
    torch.save(backbone.state_dict(), new)
    torch.save(backbone.state_dict(), old, _use_new_zipfile_serialization=False)
    head = run.head(CELL.signature)
    content = {
        "cell": CELL.model_dump(mode="json"),
        "classes": ["road", "car"],
        "backbone_sha256": "",
        "backbone": {},
        "weights": build_head(CELL.model, 2, 0, 0.1).state_dict(),
    }
    checkpoint.write_tensors(head, content)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)

    def loaded(path: Path) -> dict[str, torch.Tensor]:
        load_exactly(backbone, read_weights(path, str(path)), path)
        return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}

    return {
        "weights": Kind(new, loaded),
        "weights without a checksum": Kind(old, lambda path: shapes(loaded(path))),
        "head": Kind(head, lambda path: Predictor(path, run, group).predict(image)._asdict()),
    }


def shapes(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """All that can be known of weights without a checksum; their hash goes into every result."""
    assert all(tensor.isfinite().all() for tensor in state.values())
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor | np.ndarray):
        return one.dtype == other.dtype and np.array_equal(np.asarray(one), np.asarray(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


SMALL = ("task", "heartbeat", "failure", "submission", "manifest", "results", "counts", "index",
         "finished")  # fmt: skip
LARGE = ("weights", "weights without a checksum", "head")  # megabytes each
ABSENT = ("heartbeat", "failure", "index")  # that there is none is for the caller to judge
FORGIVING = ("submission", "finished")  # what is damaged counts for nothing, and the rest goes on


@fuzzed(
    0.15,
    which=st.sampled_from(SMALL * 3 + LARGE),
    number=st.integers(0, 2**64 - 1),
    accident=st.sampled_from(["bytes"] * 8 + ["empty", "folder", "link", "gone", "another"]),
)
def test_a_damaged_file_is_named_or_read_as_it_was_written(which, number, accident, kinds):
    kind, chance = kinds[which], random.Random(number)
    content = kind.path.read_bytes()
    try:
        happen(accident, chance, kind, kinds)
        try:
            found = kind.read(kind.path)
        except UserError as error:
            line = one_line(str(error))
            stem = re.sub(r"\.(h5|json)$", "", str(kind.path))  # counts and their index are two
            assert line == str(error) and len(line) < 1000
            assert (str(kind.path.parent) if which == "manifest" else stem) in line, line
        except FileNotFoundError:
            assert accident in ("gone", "link") and which in ABSENT
        else:
            assert same(found, kind.expected) or (which in FORGIVING and found == [])
    finally:
        if kind.path.is_dir() and not kind.path.is_symlink():
            shutil.rmtree(kind.path)
        kind.path.unlink(missing_ok=True)
        kind.path.write_bytes(content)


def happen(accident: str, chance: random.Random, kind: Kind, kinds: dict[str, Kind]) -> None:
    path, content = kind.path, kind.path.read_bytes()
    path.unlink()
    if accident == "bytes":
        path.write_bytes(damaged(chance, content))
    elif accident == "empty":
        path.touch()
    elif accident == "folder":
        path.mkdir()
    elif accident == "link":
        path.symlink_to("nowhere")
    elif accident == "another":  # a whole file of another kind; any record is one to `read_json`
        others = {k.path for k in kinds.values()} - {path}
        json = {other for other in others if other.suffix == ".json"}
        shutil.copy(
            chance.choice(sorted(others - json if kind.read is read_json else others)), path
        )
