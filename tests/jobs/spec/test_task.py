"""A task file holds all that a job needs; planning twice gives the same name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from hpc.cli import UserError
from hpc.storage.atomic import Damaged, read_json, write_json
from jobs.losses.grammar import Knot, LossSpec, Term, parse_loss
from jobs.spec.cell import Cell
from jobs.spec.protocol import Pretrain, Protocol
from jobs.spec.task import Task, bundle_task_name, read_task, write_task
from tests.jobs.cells import a_cell

COMPOSED = LossSpec(
    "three way",
    (Term("DL", True), Term("FL", False)),
    (Knot(0.0, (1.0, 0.0)), Knot(0.9, (0.25, 0.75), "cosine")),
)


def a_task(run: Path, **changes) -> Task:
    cells = tuple(a_cell(loss, seed=3) for loss in ("CE", "DLNWCE", "WFLADL"))
    composed = cells[0].model_copy(update={"loss": COMPOSED})
    settings = {"kind": "bundle", "name": "streets-seed3", "run": str(run),
                "data": "data/streets", "origin": {}}  # fmt: skip
    return Task(**{**settings, "cells": (*cells, composed), **changes})


def test_a_job_reads_what_planning_wrote(tmp_path):
    task = a_task(tmp_path, source={"commit": "0123abc", "diff": "+ µ\n"})
    path = write_task(task)
    assert path == tmp_path / "tasks/streets-seed3.json"
    read = read_task(path)
    assert read == task
    assert [cell.signature for cell in read.cells] == [cell.signature for cell in task.cells]
    assert [cell.bundle_key for cell in read.cells] == [task.cells[0].bundle_key] * 4
    assert read.cells[3].loss == COMPOSED


def test_the_task_file_is_readable_and_names_its_fields(tmp_path):
    text = write_task(a_task(tmp_path)).read_text()
    record = json.loads(text)
    assert record["kind"] == "bundle"
    assert record["cells"][1]["loss"]["name"] == "DLNWCE"
    assert record["cells"][0]["protocol"]["batch_size"] == Protocol().batch_size
    assert len(text.splitlines()) > 50


def test_every_setting_of_a_cell_survives_the_file(tmp_path):
    """Odd numbers too: a float that changed on the way would change the cell."""
    cell = a_cell(
        learning_rate=0.1 + 0.2, crop=(321, 123), weights="pretrain", naive_ramp=(1 / 3, 0.9),
        pretrain=Pretrain(epochs=7, learning_rate=1e-17), checkpoint_minutes=0.005,
    )  # fmt: skip
    (read,) = read_task(write_task(a_task(tmp_path, cells=(cell,)))).cells
    assert read == cell
    assert read.protocol.learning_rate == 0.1 + 0.2
    assert (read.signature, read.backbone_key) == (cell.signature, cell.backbone_key)


def test_a_missing_task_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the task .*/none.json: No such file"):
        read_task(tmp_path / "none.json")


def test_a_damaged_task_is_named(tmp_path):
    path = write_task(a_task(tmp_path))
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4', 1))
    with pytest.raises(Damaged, match=r"streets-seed3.json is damaged"):
        read_task(path)


@pytest.mark.parametrize("change", [{"kind": "grill"}, {"priority": 3}, {"cells": [{}]}])
def test_a_task_of_another_version_is_refused(tmp_path, change):
    path = write_task(a_task(tmp_path))
    write_json(path, {**read_json(path), **change})
    with pytest.raises(Damaged, match=r"is a task of another version; run grid again"):
        read_task(path)


def test_the_same_cells_at_the_same_step_always_have_the_same_name():
    cells = [a_cell(loss) for loss in ("CE", "WCE", "DL")]
    name = bundle_task_name(cells, 10)
    assert name.startswith("streets-seed0-")
    assert bundle_task_name([cells[0], cells[2], cells[1]], 10) == name
    assert bundle_task_name([Cell(**cell.model_dump()) for cell in cells], 10) == name
    others = {
        bundle_task_name(cells, 11),
        bundle_task_name(cells[:2], 10),
        bundle_task_name([*cells[:2], a_cell("FL")], 10),
        bundle_task_name([*cells[:2], a_cell("DL", epochs=31)], 10),
    }
    assert len(others) == 4 and name not in others


def test_a_name_is_a_file_name_whatever_the_data_set_is_called():
    odd = a_cell().model_copy(update={"dataset": "Straßen/../x y%j" + "z" * 300})
    name = bundle_task_name([odd], 0)
    assert name.startswith("Stra-en----x-y-jzzz") and len(name) < 100
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzS0123456789-")


def test_how_fast_a_cell_is_trained_is_no_part_of_what_it_is():
    cell = a_cell()
    runtime = {
        "threads": 7,
        "workers": 3,
        "deterministic": True,
        "checkpoint_minutes": 1.0,
        "profile": True,
    }
    assert a_cell(**runtime).signature == cell.signature
    assert a_cell(**runtime).bundle_key == cell.bundle_key
    assert bundle_task_name([a_cell(**runtime)], 0) == bundle_task_name([cell], 0)
    first, other = (a_cell(weights="pretrain", pretrain=Pretrain(threads=n)) for n in (1, 2))
    assert (first.signature, first.backbone_key) == (other.signature, other.backbone_key)


@pytest.mark.parametrize(
    "change",
    [{"epochs": 31}, {"batch_size": 11}, {"crop": (96, 97)}, {"weights": "coco"}, {"train": "all"},
     {"precision": "mixed"}, {"precision": "bf16"}, {"bins": 11}, {"eval_size": 0},
     {"backbone_batchnorm": "train"}, {"decay": "polynomial"}, {"weight_decay": 0.0}],
)  # fmt: skip
def test_what_changes_a_result_makes_another_cell(change):
    assert a_cell(**change).signature != a_cell().signature


def test_a_cell_is_the_same_wherever_the_file_of_its_weights_lies():
    cells = [a_cell(weights=path) for path in ("w.pt", "../old/w.pt", "~/w.pt")]
    assert len({cell.signature for cell in cells}) == 1
    others = [a_cell(weights=path) for path in ("v.pt", "./imagenet", "imagenet", "none")]
    assert len({cell.signature for cell in (*cells, *others)}) == 5


def test_training_without_end_is_refused():
    with pytest.raises(UserError, match="are 1000000000 steps, more than 999999999; choose fewer"):
        Protocol(epochs=10**6, batch_size=1).steps_per_epoch(1000)
    assert Protocol(epochs=10**6, batch_size=1).steps_per_epoch(999) == 999


def test_cells_share_a_bundle_if_they_share_all_up_to_the_backbones_output():
    cell = a_cell("CE")
    assert a_cell("DLNWCE").bundle_key == cell.bundle_key
    assert a_cell(model="deeplabv3_mobilenet_v3_large").bundle_key == cell.bundle_key
    apart = [a_cell(model="fcn_resnet50"), a_cell(seed=1), a_cell(batch_size=11), a_cell(bins=11)]
    assert len({c.bundle_key for c in (cell, *apart)}) == 5


def test_a_cell_that_trains_the_whole_network_shares_with_none():
    assert a_cell("CE", train="all").bundle_key != a_cell("DL", train="all").bundle_key
    published = [a_cell(model=f"{head}_resnet50", weights="coco") for head in ("fcn", "deeplabv3")]
    assert len({c.bundle_key for c in published}) == 2  # each has a backbone of its own


def test_one_backbone_is_pre_trained_for_all_seeds_and_heads():
    keys = {
        a_cell(loss, model, seed, weights="pretrain", epochs=epochs).backbone_key
        for loss in ("CE", "DL")
        for model in ("fcn_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
        for seed in (0, 1)
        for epochs in (3, 30)
    }
    assert len(keys) == 1
    other = a_cell(weights="pretrain", pretrain=Pretrain(epochs=7))
    assert other.backbone_key not in keys
    assert a_cell(weights="pretrain", crop=(96, 96)).backbone_key not in keys


def test_a_loss_is_its_terms_and_schedule_as_well_as_its_name():
    naive = parse_loss("DLNWCE"), parse_loss("DLNWCE", naive=(0.2, 0.9))
    assert asdict(naive[0]) != asdict(naive[1])
    cells = [a_cell().model_copy(update={"loss": loss}) for loss in (*naive, COMPOSED)]
    assert len({Cell(**cell.model_dump()).signature for cell in cells}) == 3
