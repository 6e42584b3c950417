"""The main job: train the cells of one bundle and write their counts. Read this file first.

    python -m jobs.train TASK.json          one rank; many under srun, torchrun or mpiexec

Functions stand in the order in which they run. In each step the frozen backbone runs once for all
cells, and each head runs its own forward and backward pass on the features. A job resumes if it
finds a checkpoint.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep.shards.local_copy import local_shards
from data_prep.shards.manifest import Manifest
from data_prep.shards.reader import SplitReader
from hpc.cli import UserError, argument_parser, run
from hpc.distributed.launcher import read_env
from hpc.distributed.preemption import STOPPED_BY, StopRequest, stop_request
from hpc.distributed.process_group import Group, process_group
from hpc.scheduler.auto import requeue
from hpc.storage import checkpoint
from jobs.data.batches import TrainingBatches
from jobs.data.loader import Transfer, load_steps
from jobs.losses.functional import inverse_frequencies
from jobs.metrics.counts import Counts
from jobs.models.build import Backbone, Features, normalise
from jobs.models.memory_format import for_file
from jobs.spec.cell import Cell
from jobs.spec.counts_file import cell_record, counted_cells, write_counts
from jobs.spec.task import Task, read_task
from jobs.training.backbone import LoadedBackbone, freeze, load_backbone, moving_buffers, start_head
from jobs.training.cell_trainer import CellTrainer, autocast, half_precision
from jobs.training.evaluate import evaluate, stack
from jobs.training.job_run import Action, JobRun, require_data
from jobs.training.overflow import all_finite, remember
from jobs.training.timings import report
from jobs.training.torch_settings import configure_torch

NOT_FINITE = "the trained network's output is not finite"

_SLOW = "the backbone's features overflow fp16; in such steps they are computed again in fp32"


def main(argv: Sequence[str]) -> int:
    """Train the cells of a task file."""
    parser = argument_parser("python -m jobs.train", __doc__)
    parser.add_argument("task", type=Path, help="a task file of a run directory")
    parser.add_argument("--profile", action="store_true", help="measure the time of each part")
    arguments = parser.parse_args(argv)
    task = read_task(arguments.task, "bundle")
    if arguments.profile:
        task = task.model_copy(update={"cells": tuple(c.profiled() for c in task.cells)})
    configure_torch(task.cells[0].protocol)
    with stop_request() as stop, process_group(read_env(), task.paths.rendezvous) as group:
        train_bundle(task, group, stop)
    return 0


def train_bundle(task: Task, group: Group, stop: StopRequest) -> None:
    """Train, evaluate and publish the unfinished cells of `task`; on a stop, save and return."""
    task = unfinished(task, group)
    if task.cells:
        with local_shards(task.data, task.node_local) as manifest:
            require_data(task, manifest, group)
            train_on(manifest, task, group, stop)


def unfinished(task: Task, group: Group) -> Task:
    """Return `task` without finished cells, so that rerunning an old script is safe."""
    done = group.on_main(lambda: counted_cells(task.paths.counts))
    cells = tuple(cell for cell in task.cells if cell.signature not in done)
    if group.is_main and len(cells) < len(task.cells):
        left = f"the other {len(cells)} go on" if cells else "there is nothing to do"
        number = len(task.cells) - len(cells)
        print(f"{task.name}: {number} cells are done already; {left}", file=sys.stderr, flush=True)
    return task.model_copy(update={"cells": cells})


def train_on(manifest: Manifest, task: Task, group: Group, stop: StopRequest) -> None:
    """Do the work of `train_bundle` on the data set of `manifest`."""
    backbone = load_backbone(task.cells[0], task.paths, group)
    inputs = {"data set": manifest.fingerprint, "backbone": backbone.sha256}
    job = JobRun(task, group, stop, inputs)
    frozen, trainers = make_trainers(task, manifest, backbone, group)
    start = job.resume(trainers, frozen)

    step, total = train(job, trainers, frozen, SplitReader(manifest, "train"), start)
    counts = evaluate_cells(job, trainers, frozen, manifest, total) if step == total else None
    if counts is None:
        stop_and_requeue(job, step, total)
        return
    job.group.on_main(lambda: publish(job, trainers, counts, manifest, backbone))
    job.finish("done", total, total)


def make_trainers(
    task: Task, manifest: Manifest, backbone: LoadedBackbone, group: Group
) -> tuple[Backbone | None, list[CellTrainer]]:
    """Return the backbone if it is frozen, else None, and a trainer for each cell not failed."""
    whole = task.cells[0].protocol.train == "all"
    if not whole:
        freeze(backbone.module, task.cells[0])
    failed = failed_cells(task, group)
    weights = inverse_frequencies(manifest.splits["train"].class_pixels)
    trainers = [
        CellTrainer(cell, len(manifest.classes), weights, group, backbone.module if whole else None)
        for cell in task.cells
        if cell.signature not in failed
    ]
    for trainer in trainers:
        start_head(trainer.head, backbone)
    return (None if whole else backbone.module), trainers


def failed_cells(task: Task, group: Group) -> set[str]:
    """Return the signatures of the cells that have failed before, as rank 0 sees them.

    A network file system may show the ranks different files.
    """
    signatures = {cell.signature for cell in task.cells}
    failed = {s for s in signatures if group.is_main and task.paths.failure(s).exists()}
    found: set[str] = group.broadcast(failed)
    return found


def train(
    job: JobRun,
    trainers: Sequence[CellTrainer],
    backbone: Backbone | None,
    reader: SplitReader,
    start: int,
) -> tuple[int, int]:
    """Train from step `start` to the end or to a stop. Return (steps done, total steps).

    A checkpoint holds the last state. If all cells have failed, return (total, total).
    """
    cell, group = job.task.cells[0], job.group
    batches = TrainingBatches(reader, cell.protocol, cell.seed, group.rank, group.world_size)
    total = cell.protocol.epochs * batches.steps_per_epoch
    transfer = Transfer(group.device)
    job.begin(start)
    if cell.protocol.profile:
        group.watch.start()
    step = start
    # close on errors too: a traceback would keep the loader processes alive
    with closing(load_steps(batches, start, total, cell.protocol.workers)) as items:
        batch = job.fetch(items)
        job.raise_trouble()
        while batch is not None and (active := still_training(trainers)):
            job.heartbeat("training", step, total)
            with group.watch.part("data"):
                batch = transfer(batch)
            with group.watch.part("backbone"):
                inputs = features(backbone, batch.images, cell, group)
            target = batch.target.long()
            for trainer in active:  # all ranks train them in this order
                trainer.step(inputs, batch, target, step, total)
                if trainer.failure:
                    job.group.on_main(partial(job.give_up, trainer, step))
            step += 1
            batch = job.fetch(items)  # before `decide`, which reports a damaged sample to all ranks
            action = job.decide()
            if action is not Action.GO_ON or step == total:
                job.save(step, still_training(trainers), backbone)
            if action is Action.ABORT:
                job.raise_trouble()
            if action is Action.STOP:
                break
    report(job, "training", "steps", step - start)
    return (step, total) if still_training(trainers) else (total, total)


def still_training(trainers: Sequence[CellTrainer]) -> list[CellTrainer]:
    """Return the trainers of the cells that have not failed."""
    return [trainer for trainer in trainers if trainer.failure is None]


def features(backbone: nn.Module | None, images: Tensor, cell: Cell, group: Group) -> Features:
    """Return the input of the trainers for uint8 images [b, 3, h, w].

    It is the output of the frozen backbone, without a gradient. If the whole network trains, it is
    the normalised images. Features that overflow fp16 on any rank are computed in fp32.
    """
    inputs = normalise(images)
    if backbone is None:
        return inputs
    half = half_precision(cell.protocol, group)
    in_fp16 = half == torch.float16
    restore = remember(moving_buffers(backbone, cell.protocol).values() if in_fp16 else ())
    with torch.no_grad():
        with autocast(group.device, half):
            found: Features = backbone(inputs)
        if in_fp16 and not all_finite(found, group):
            warnings.warn(_SLOW, RuntimeWarning, stacklevel=1)  # printed once in each process
            restore()
            found = backbone(inputs)
    return found


def evaluate_cells(
    job: JobRun,
    trainers: Sequence[CellTrainer],
    backbone: Backbone | None,
    manifest: Manifest,
    total: int,
) -> list[Counts | None] | None:
    """Return the counts of the cells that have not failed, or None on a stop.

    The counts of a cell are None if its logits are not all finite.
    """
    active = still_training(trainers)
    for module in [backbone, *(trainer.network for trainer in active)]:
        if module is not None:
            module.eval()

    def forward(images: Tensor) -> list[Tensor]:
        job.heartbeat("evaluating", total, total)
        with watch.part("backbone"):
            inputs = images if backbone is None else backbone(images)
        with watch.part("heads"):
            return [trainer.network(inputs) for trainer in active]

    reader, watch = SplitReader(manifest, "val"), job.group.watch
    with watch.part("counts"):
        counts = evaluate(
            forward, len(active), reader, len(manifest.classes), job.task.cells[0].protocol,
            job.group, lambda: job.agree() is Action.STOP, job.fetch,
        )  # fmt: skip
    report(job, "evaluation", "images", len(reader) if counts else 0)
    return counts


def publish(
    job: JobRun,
    trainers: Sequence[CellTrainer],
    counts: Sequence[Counts | None],
    manifest: Manifest,
    backbone: LoadedBackbone,
) -> None:
    """Write heads, then counts; the counts index makes the cells done. Only rank 0 calls it.

    Removes the checkpoints of all cells of the task, also of failed ones.
    """
    paths, finished = job.task.paths, []
    for trainer, cell_counts in zip(still_training(trainers), counts, strict=True):
        if cell_counts is None:
            trainer.failure = NOT_FINITE
            job.give_up(trainer, None)
            continue
        finished.append((trainer, cell_counts))
    for trainer, _ in finished:
        save_head(job, trainer, manifest, backbone)
    if finished:
        write_counts(
            paths.counts_of(job.task.name, job.generation.number),
            [cell_record(t.cell, backbone.sha256) | t.overflows for t, _ in finished],
            stack([cell_counts for _, cell_counts in finished]),
            job.counts_record(manifest),
            job.generation.check,
        )
    done = [cell.signature for cell in job.task.cells]
    checkpoint.prune(paths.checkpoints(job.bundle_key), job.generation, done)
    job.log(f"done: {len(finished)} cells")


def save_head(
    job: JobRun, trainer: CellTrainer, manifest: Manifest, backbone: LoadedBackbone
) -> None:
    """Write the head of a cell, or its network; `torch.load` needs no GPU and no pickled code.

    It includes the running statistics of a frozen backbone if training moved them.
    """
    content = {
        "cell": trainer.cell.model_dump(mode="json"),
        "classes": list(manifest.classes),
        "backbone_sha256": backbone.sha256,
        "weights": for_file(trainer.network.state_dict()),
        "backbone": for_file(moving_buffers(backbone.module, trainer.cell.protocol)),
    }
    path = job.task.paths.head(trainer.cell.signature)
    checkpoint.write_tensors(path, content, job.generation.check)


def stop_and_requeue(job: JobRun, step: int, total: int) -> bool:
    """Requeue a job that has stopped and saved. Return True if Slurm starts it again.

    All ranks must call this together.
    """
    job.finish("stopped", step, total)
    name = job.stop.signal.name if job.stop.signal else "another rank's signal"
    job.log(f"{STOPPED_BY} {name} after step {step} of {total}")
    requeued: bool = job.group.broadcast(job.group.is_main and _requeue(job))
    job.log("requeued" if requeued else "not requeued; run grid again to resume")
    return requeued


def _requeue(job: JobRun) -> bool:
    # after a preemption too: Slurm does so only if the job still runs when its grace time ends
    try:
        return requeue(job.group.env)
    except UserError as error:  # for example in an interactive allocation
        job.log(f"warning: {error}")
        return False


if __name__ == "__main__":
    run(main)
