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
from jobs.train import evaluate_cells, make_trainers, stop_and_requeue, train
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
    (consumer,) = task.cells
    backbone = task.paths.backbone(consumer.backbone_key)
    if group.broadcast(backbone.exists() and backbone.with_suffix(".json").exists()):
        if group.is_main:
            line = f"{task.name}: the backbone is trained already; there is nothing to do"
            print(line, file=sys.stderr, flush=True)
        return True
    trained = task.model_copy(update={"cells": (pretraining_cell(consumer),)})
    _refuse_failed(trained)
    with local_shards(task.data, task.node_local) as manifest:
        require_data(task, manifest, group)
        return pretrain_on(manifest, trained, consumer, group, stop)


def pretrain_on(
    manifest: Manifest, trained: Task, consumer: Cell, group: Group, stop: StopRequest
) -> bool:
    """Train the one cell of `trained`, whose backbone `consumer` uses; see `pretrain_backbone`."""
    start = load_backbone(trained.cells[0], trained.paths, group)
    job = JobRun(trained, group, stop, {"data set": manifest.fingerprint})
    _, trainers = make_trainers(trained, manifest, start, group)
    step, total = train(
        job, trainers, None, SplitReader(manifest, "train"), job.resume(trainers, None)
    )
    if trainers[0].failure:
        raise UserError(
            f"pre-training stopped: {trainers[0].failure}; lower learning_rate in "
            "[protocol.pretrain]"
        )
    counts = evaluate_cells(job, trainers, None, manifest, total) if step == total else None
    if counts is None:
        return stop_and_requeue(job, step, total) or not group.is_main
    job.on_main(lambda: publish_backbone(job, trainers[0], consumer, manifest, counts[0]))
    job.finish("done", total, total)
    return True


def _refuse_failed(trained: Task) -> None:
    failure = trained.paths.failure(trained.cells[0].signature)
    if failure.exists():
        raise UserError(
            f"pre-training stopped before: {read_json(failure)['reason']}; lower learning_rate in "
            f"[protocol.pretrain], or delete {failure} to try it again"
        )


def publish_backbone(
    job: JobRun, trainer: CellTrainer, consumer: Cell, manifest: Manifest, counts: Counts | None
) -> None:
    """Write the backbone's weights under torchvision's names, and a record of their scores.

    Only rank 0 calls it.
    """
    path = job.task.paths.backbone(consumer.backbone_key)
    assert isinstance(trainer.network, Network)
    check = job.generation.check
    checkpoint.write_tensors(path, for_file(trainer.network.backbone.state_dict()), check)
    record = {
        "sha256": file_sha256(path),
        "manifest": manifest.fingerprint,
        "dataset": consumer.dataset,
        "model": trainer.cell.model,
        "protocol": trainer.cell.protocol.model_dump(mode="json"),
        "seed": trainer.cell.seed,
        "scores": scores(counts) if counts is not None else {},
        "provenance": job.provenance,
    }
    write_json(path.with_suffix(".json"), record, check)
    done = [trainer.cell.signature]
    checkpoint.prune(job.task.paths.checkpoints(job.bundle_key), job.generation, done)
    job.log("done: the backbone is trained")


if __name__ == "__main__":
    run(main)
