"""Pre-train a backbone for `weights = "pretrain"`, once for each data set and backbone.

    python -m jobs.pretrain TASK.json

It trains a whole network with CE, the plainest head of the backbone and a seed of its own. The
cells share its backbone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.shards.local_copy import local_shards
from data_prep.shards.manifest import Manifest
from data_prep.shards.reader import SplitReader
from hpc.cli import UserError, argument_parser, run
from hpc.distributed.launcher import read_env
from hpc.distributed.preemption import StopRequest, stop_request
from hpc.distributed.process_group import Group, process_group
from hpc.storage import checkpoint
from hpc.storage.atomic import file_sha256, read_json, write_json
from jobs.metrics.counts import Counts
from jobs.metrics.scores import scores
from jobs.models.build import Network
from jobs.models.memory_format import for_file
from jobs.spec.cell import Cell, pretraining_cell
from jobs.spec.task import Task, read_task
from jobs.train import (
    NOT_FINITE,
    evaluate_cells,
    failed_cells,
    make_trainers,
    stop_and_requeue,
    train,
)
from jobs.training.backbone import load_backbone
from jobs.training.cell_trainer import CellTrainer
from jobs.training.job_run import JobRun, require_data
from jobs.training.torch_settings import configure_torch


def main(argv: Sequence[str]) -> int:
    """Pre-train the backbone of a task file's cell."""
    parser = argument_parser("python -m jobs.pretrain", __doc__)
    parser.add_argument("task", type=Path, help="a task file of a run directory")
    task = read_task(parser.parse_args(argv).task, "pretrain")
    configure_torch(pretraining_cell(task.cells[0]).protocol)
    with stop_request() as stop, process_group(read_env(), task.paths.rendezvous) as group:
        return 0 if pretrain_backbone(task, group, stop) else 1


def pretrain_backbone(task: Task, group: Group, stop: StopRequest) -> bool:
    """Train the network of the task's cell and publish its backbone; on a stop, save and return.

    Does nothing if the backbone exists. Returns False if jobs that need the backbone must not
    start: this job was stopped, and Slurm does not start it again.
    """
    (user_cell,) = task.cells
    backbone = task.paths.backbone(user_cell.backbone_key)
    if group.broadcast(backbone.exists() and backbone.with_suffix(".json").exists()):
        if group.is_main:
            line = f"{task.name}: the backbone is trained already; there is nothing to do"
            print(line, file=sys.stderr, flush=True)
        return True
    pretrain_task = task.model_copy(update={"cells": (pretraining_cell(user_cell),)})
    if failed_cells(pretrain_task, group):
        raise _failed_before(pretrain_task)
    with local_shards(task.data, task.node_local) as manifest:
        require_data(task, manifest, group)
        return pretrain_on(manifest, pretrain_task, user_cell, group, stop)


def pretrain_on(
    manifest: Manifest, pretrain_task: Task, user_cell: Cell, group: Group, stop: StopRequest
) -> bool:
    """Do the work of `pretrain_backbone` on the data set of `manifest`.

    Args:
        manifest: the data set.
        pretrain_task: trains the cell whose network gives the backbone.
        user_cell: a cell that uses the backbone.
        group: the ranks.
        stop: the signal to stop, if one came.
    """
    start = load_backbone(pretrain_task.cells[0], pretrain_task.paths, group)
    job = JobRun(pretrain_task, group, stop, {"data set": manifest.fingerprint})
    _, (trainer,) = make_trainers(pretrain_task, manifest, start, group)
    step, total = train(
        job, [trainer], None, SplitReader(manifest, "train"), job.resume([trainer], None)
    )
    if trainer.failure:
        raise _failed(trainer)
    evaluated = evaluate_cells(job, [trainer], None, manifest, total) if step == total else None
    if evaluated is None:
        return stop_and_requeue(job, step, total)
    (counts,) = evaluated
    if counts is None:
        trainer.failure = NOT_FINITE
        job.group.on_main(lambda: job.give_up(trainer, None))
        raise _failed(trainer)
    job.group.on_main(lambda: publish_backbone(job, trainer, user_cell, manifest, counts))
    job.finish("done", total, total)
    return True


def _failed(trainer: CellTrainer) -> UserError:
    advice = "lower learning_rate in [protocol.pretrain]"
    return UserError(f"pre-training stopped: {trainer.failure}; {advice}")


def _failed_before(pretrain_task: Task) -> UserError:
    failure = pretrain_task.paths.failure(pretrain_task.cells[0].signature)
    return UserError(
        f"pre-training stopped before: {read_json(failure)['reason']}; lower learning_rate in "
        f"[protocol.pretrain], or delete {failure} to try it again"
    )


def publish_backbone(
    job: JobRun, trainer: CellTrainer, user_cell: Cell, manifest: Manifest, counts: Counts
) -> None:
    """Write the backbone's weights under torchvision's names, and a record of their scores.

    Only rank 0 calls it.
    """
    path = job.task.paths.backbone(user_cell.backbone_key)
    assert isinstance(trainer.network, Network)
    check = job.generation.check
    checkpoint.write_tensors(path, for_file(trainer.network.backbone.state_dict()), check)
    record = {
        "sha256": file_sha256(path),
        "manifest": manifest.fingerprint,
        "dataset": user_cell.dataset,
        "model": trainer.cell.model,
        "protocol": trainer.cell.protocol.model_dump(mode="json"),
        "seed": trainer.cell.seed,
        "scores": scores(counts),
        "provenance": job.provenance,
    }
    write_json(path.with_suffix(".json"), record, check)
    done = [trainer.cell.signature]
    checkpoint.prune(job.task.paths.checkpoints(job.bundle_key), job.generation, done)
    job.log("done: the backbone is trained")


if __name__ == "__main__":
    run(main)
