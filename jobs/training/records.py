"""What the index of a counts file says of its cells and of their job."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from data_prep.shards.manifest import Manifest
from hpc.cli import UserError
from hpc.storage.atomic import read_json
from jobs.spec.cell import Cell
from jobs.spec.task import Task

if TYPE_CHECKING:  # they import torch, which what a cell is called does not need
    from hpc.distributed.process_group import Group
    from jobs.training.job_run import Run


def require_data(task: Task, manifest: Manifest, group: Group) -> None:
    """Raise `UserError` on all ranks if the packed data set is not the one that `task` was made
    for, or is not the same on all ranks, as while it is packed anew. All ranks must call it."""
    problem = ""
    try:
        cell = task.cells[0]
        manifest.require_settings(task.origin, task.data, cell.dataset)
        if task.kind == "bundle" and cell.protocol.weights == "pretrain":
            _require_same_backbone(task, manifest)
    except UserError as error:
        problem = str(error)
    if group.broadcast(manifest.fingerprint) != manifest.fingerprint:
        problem = f"{task.data} was packed anew while the ranks started; run grid again"
    rank = group.max(group.rank + 1 if problem else 0)
    if rank:
        raise UserError(group.broadcast(problem, source=rank - 1))


def _require_same_backbone(task: Task, manifest: Manifest) -> None:
    """Raise `UserError` if the backbone that was trained for the cells saw other data."""
    path = task.paths.backbone(task.cells[0].backbone_key)
    try:
        trained_on = read_json(path.with_suffix(".json"))["manifest"]
    except FileNotFoundError:  # loading it says so
        return
    if trained_on != manifest.fingerprint:
        raise UserError(
            f"{path} was trained on other data than {task.data} holds now; restore the data set, "
            "or submit grid with --retrain stale"
        )


def cell_record(cell: Cell, backbone: str) -> dict[str, str]:
    """How a counts file names a cell, counted with the backbone of that SHA-256."""
    return {"signature": cell.signature, "name": cell.name, "backbone": backbone}


def job_record(job: Run, manifest: Manifest) -> dict[str, Any]:
    """What holds for all cells of a counts file; their settings stand in the task's file."""
    return {
        "task": job.task.name,
        "generation": job.generation.number,
        "manifest": manifest.fingerprint,
        "provenance": job.provenance,
        "source": job.task.source,
        "time": time.time(),
    }
