"""Pre-training that has failed says why, however often it is submitted; and cells are trained on
the data that their backbone saw."""

from __future__ import annotations

import signal

import pytest

from hpc.cli import UserError
from hpc.distributed.preemption import StopRequest
from hpc.storage.atomic import write_json
from jobs import pretrain
from jobs.pretrain import pretrain_backbone, pretraining_cell
from jobs.spec.task import Task
from jobs.train import failed_cells, train_bundle
from tests.jobs.cells import a_cell


def of(streets) -> dict:
    return {"data": str(streets.folder), "origin": streets.origin}


def test_a_pre_training_that_diverged_is_not_started_again_in_silence(tmp_path, streets, alone):
    cell = a_cell(weights="pretrain")
    settings = {"kind": "pretrain", "name": "pretrain-0123", **of(streets)}
    task = Task(**settings, run=str(tmp_path), cells=(cell,))
    failure = task.paths.failure(pretraining_cell(cell).signature)
    write_json(failure, {"cell": "", "step": 2, "reason": "the loss was nan at step 2 of 6"})
    with pytest.raises(UserError) as refused:
        pretrain_backbone(task, alone, StopRequest())
    assert str(refused.value) == (
        "pre-training stopped before: the loss was nan at step 2 of 6; lower learning_rate in "
        f"[protocol.pretrain], or delete {failure} to try it again"
    )


def test_a_network_with_logits_that_are_not_finite_publishes_no_backbone(
    tmp_path, streets, alone, monkeypatch
):
    small = {"resize": (40, 56), "crop": (32, 32), "eval_size": 0, "threads": 1, "workers": 0}
    cell = a_cell(weights="pretrain", **small, pretrain={"epochs": 1, "batch_size": 4})
    settings = {"kind": "pretrain", "name": "pretrain-0123", **of(streets)}
    task = Task(**settings, run=str(tmp_path), cells=(cell,))
    monkeypatch.setattr(pretrain, "evaluate_cells", lambda *_: [None])
    for when in ("", " before"):
        with pytest.raises(UserError, match=rf"pre-training stopped{when}: .* is not finite; "):
            pretrain_backbone(task, alone, StopRequest())
    assert not list(task.paths.backbone(cell.backbone_key).parent.glob("*"))


def test_rank_0_decides_which_cells_have_failed(tmp_path, streets, alone):
    """Another node may still see a failure record that `retry` has renamed, and the reverse."""
    cells = (a_cell("CE"), a_cell("WCE"))
    task = Task(kind="bundle", name="task", **of(streets), run=str(tmp_path), cells=cells)
    mine, rank_0s = (cell.signature for cell in cells)
    write_json(task.paths.failure(mine), {})
    assert failed_cells(task, alone) == {mine}
    alone.rank, alone.broadcast = 1, lambda _: {rank_0s}
    assert failed_cells(task, alone) == {rank_0s}


def test_a_pre_training_that_was_stopped_does_not_count_as_a_success(tmp_path, streets, alone):
    small = {"resize": (40, 56), "crop": (32, 32), "eval_size": 0, "threads": 1, "workers": 0}
    cell = a_cell(weights="pretrain", **small, pretrain={"epochs": 1, "batch_size": 4})
    settings = {"kind": "pretrain", "name": "pretrain-0123", **of(streets)}
    task = Task(**settings, run=str(tmp_path), cells=(cell,))
    stopped = StopRequest()
    stopped.signal = signal.SIGTERM
    assert not pretrain_backbone(task, alone, stopped)  # so no cell starts without its backbone
    assert pretrain_backbone(task, alone, StopRequest())
    assert task.paths.backbone(cell.backbone_key).exists()


def test_cells_are_not_trained_on_a_backbone_that_saw_other_data(tmp_path, streets, alone):
    cell = a_cell(weights="pretrain")
    settings = {"kind": "bundle", "name": "task", **of(streets)}
    task = Task(**settings, run=str(tmp_path), cells=(cell,))
    backbone = task.paths.backbone(cell.backbone_key)
    write_json(backbone.with_suffix(".json"), {"manifest": "that of other data"})
    with pytest.raises(UserError) as refused:
        train_bundle(task, alone, StopRequest())
    assert str(refused.value) == (
        f"{backbone} was trained on other data than {streets.folder} holds now; restore the data "
        "set, or submit grid with --retrain stale"
    )
