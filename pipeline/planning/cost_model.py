"""Estimate what a plan costs before anything is queued: time, memory, storage, files. The model is
arithmetic on `ASSUMPTIONS`; a measured step time takes the place of its rates."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hpc.scheduler.cluster_profile import ClusterProfile
from hpc.storage.checkpoint import KEPT
from jobs.models.registry import (
    BACKBONE_ACTIVATIONS,
    BACKBONE_MACS,
    BACKBONE_PARAMETERS,
    FEATURE_CHANNELS,
    HEAD_ACTIVATIONS,
    HEAD_MACS,
    HEAD_PARAMETERS,
    HEAD_PASSES,
    MODELS,
)
from jobs.spec.cell import Cell
from jobs.spec.protocol import Protocol

FLOPS = {"gpu fp32": 9e12, "gpu mixed": 36e12, "cpu": 40e9}  # a second, of a GPU or a CPU thread
ASSUMPTIONS = (
    f"a V100 does {FLOPS['gpu fp32'] / 1e12:.0f} TFLOP/s in fp32 and "
    f"{FLOPS['gpu mixed'] / 1e12:.0f} in mixed precision, a CPU thread "
    f"{FLOPS['cpu'] / 1e9:.0f} GFLOP/s (a third to a half of their peaks); a backward pass costs "
    "two forward passes, and one where the backbone is frozen; loading overlaps with computing; "
    "losses and the exchange of gradients are not counted; ranks share a batch evenly; unknown "
    "images have 4:3 format; a process takes 3 GB of node memory, a loader 0.5 GB, CUDA 1.5 GB of "
    "a GPU, and a fifth of the rest is lost to fragmentation"
)
_BYTES = 4  # a float32
_PROCESS, _LOADER = 3e9, 0.5e9
CUDA, LOST = 1.5e9, 1.2  # bytes of CUDA itself, and the factor of fragmentation
_LOGIT_COPIES = 6  # full-size logits, their log-softmax, what losses keep, gradients
_BACKBONE_BUFFERS = 150  # numbers a pixel that a forward pass without gradient holds at its widest
_FILES = {"task": 12, "cell": 1, "checkpoint": 1}  # records, counts, logs; a head; an index


@dataclass(frozen=True)
class Job:
    """The size of one job.

    Attributes:
        cells: The cells that it trains.
        train_images: The number of training images; 0 if not known yet.
        val_pixels: The pixels of all validation images at the network's input; 0 if not known yet.
        num_classes: The number of classes of the data set.
    """

    cells: Sequence[Cell]
    train_images: int
    val_pixels: float
    num_classes: int

    @property
    def protocol(self) -> Protocol:
        return self.cells[0].protocol

    @property
    def steps(self) -> int:
        """The number of optimiser steps; 0 if the number of images is not known."""
        return self.protocol.epochs * (self.train_images // self.protocol.batch_size)


@dataclass(frozen=True)
class Cost:
    """The largest cost of one job.

    Attributes:
        seconds: Wall time in seconds.
        gpu_bytes: Memory of one GPU in bytes.
        node_bytes: Memory of one node in bytes.
        storage: Bytes in the run directory.
        files: Number of files in the run directory.
    """

    seconds: float
    gpu_bytes: float
    node_bytes: float
    storage: float
    files: int


def cost(job: Job, cluster: ClusterProfile, measured: float = 1.0) -> Cost:
    """Return the cost of `job` on `cluster`. `measured`: measured step time divided by the modelled
    one."""
    ranks = cluster.nodes * cluster.tasks_per_node
    in_fp32 = job.protocol.model_copy(update={"precision": "fp32"})
    seconds = job.steps * step_flops(job) / rate(job.protocol, cluster)
    seconds += evaluation_flops(job) / rate(in_fp32, cluster)  # whatever trained the cells
    loaders = job.protocol.workers * _LOADER
    return Cost(
        seconds=measured * seconds / ranks,
        gpu_bytes=gpu_bytes(job, ranks),
        node_bytes=cluster.tasks_per_node * (_PROCESS + loaders),
        storage=sum(map(bytes_of, job.cells)),
        files=files_of(job.cells),
    )


def step_flops(job: Job) -> float:
    """Return the floating-point operations of one optimiser step: one pass of the backbone for all
    cells, and forward and backward of each head."""
    protocol = job.protocol
    pixels = protocol.batch_size * protocol.crop[0] * protocol.crop[1]
    whole = protocol.train == "all"
    heads = sum(
        (3 if whole else HEAD_PASSES[MODELS[cell.model].head]) * _head_macs(cell)
        for cell in job.cells
    )
    return 2 * pixels * ((3 if whole else 1) * _backbone_macs(job) + heads)


def evaluation_flops(job: Job) -> float:
    """Return the floating-point operations of one pass over the validation images."""
    return 2 * job.val_pixels * (_backbone_macs(job) + sum(map(_head_macs, job.cells)))


def rate(protocol: Protocol, cluster: ClusterProfile) -> float:
    """Return the floating-point operations per second of one rank."""
    if cluster.gpus_per_node:
        return FLOPS["gpu fp32" if protocol.precision == "fp32" else "gpu mixed"]
    return FLOPS["cpu"] * protocol.threads


def gpu_bytes(job: Job, ranks: int) -> float:
    """Return the memory of a rank's GPU in bytes: all weights, and the activations of one head at a
    time."""
    protocol, backbone = job.protocol, MODELS[job.cells[0].model].backbone
    images = -(-protocol.batch_size // ranks)
    pixels = images * protocol.crop[0] * protocol.crop[1]
    whole = protocol.train == "all"
    # weights, momentum, and gradients, which are views of the buckets in which they travel
    weights = sum(3 * _head_parameters(cell) for cell in job.cells)
    weights += BACKBONE_PARAMETERS[backbone] * (3 if whole else 1)
    of_head = max(
        HEAD_ACTIVATIONS[MODELS[c.model].head][FEATURE_CHANNELS[backbone]] for c in job.cells
    )
    numbers = pixels * of_head
    numbers += pixels * (BACKBONE_ACTIVATIONS[backbone] if whole else _BACKBONE_BUFFERS)
    numbers += pixels * job.num_classes * _LOGIT_COPIES
    return CUDA + LOST * _BYTES * (weights + numbers)


def files_of(cells: Sequence[Cell]) -> int:
    """Return the maximum number of files in the run directory of a job of these cells."""
    return _FILES["task"] + len(cells) * (_FILES["cell"] + KEPT + 1) + KEPT + 1


def bytes_of(cell: Cell) -> int:
    """Return the maximum bytes of a cell on disk: its trained weights and, during training, the
    kept checkpoints and the one being written."""
    return int(_trained(cell) * _BYTES) + (KEPT + 1) * checkpoint_bytes(cell)


def checkpoint_bytes(cell: Cell) -> int:
    """Return the bytes of a cell in a checkpoint: its trained weights and their momentum."""
    return int(_trained(cell) * _BYTES) * 2


def _trained(cell: Cell) -> float:
    """Return the number of trained weights of a cell."""
    parameters = _head_parameters(cell)
    if cell.protocol.train == "all":
        parameters += BACKBONE_PARAMETERS[MODELS[cell.model].backbone]
    return parameters


def cells_that_fit(job: Job, cluster: ClusterProfile, measured: float = 1.0) -> int:
    """Return how many of the cells of a job, at least one, fit into the memory of a GPU and the
    time limit."""

    def is_too_large(number: int) -> bool:
        estimate = cost(replace(job, cells=job.cells[:number]), cluster, measured)
        gpu_is_full = cluster.gpus_per_node and estimate.gpu_bytes > cluster.gpu_memory_gb * 1e9
        return bool(gpu_is_full) or estimate.seconds > 60 * cluster.minutes

    return 1 + bisect_left(range(2, len(job.cells) + 1), True, key=is_too_large)


def wall_seconds(costs: Sequence[Cost], at_once: int) -> float:
    """Return the end of the last job in seconds, if `at_once` jobs run at the same time and each
    starts as soon as one has ended."""
    ends = [0.0] * min(at_once, max(1, len(costs)))
    for one in costs:
        heapq.heapreplace(ends, ends[0] + one.seconds)
    return max(ends)


def slower_than_modelled(step_seconds: float, job: Job, cluster: ClusterProfile) -> float:
    """Return the measured step time, `step_seconds`, divided by the modelled one."""
    ranks = cluster.nodes * cluster.tasks_per_node
    return step_seconds * ranks * rate(job.protocol, cluster) / step_flops(job)


def _backbone_macs(job: Job) -> float:
    return BACKBONE_MACS[MODELS[job.cells[0].model].backbone]


def _head_macs(cell: Cell) -> float:
    head, backbone = MODELS[cell.model]
    return HEAD_MACS[head][FEATURE_CHANNELS[backbone]]


def _head_parameters(cell: Cell) -> float:
    head, backbone = MODELS[cell.model]
    return HEAD_PARAMETERS[head][FEATURE_CHANNELS[backbone]]
