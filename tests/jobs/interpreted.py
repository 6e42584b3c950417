"""Runs kernels of Triton without a GPU: in a process of its own, under Triton's interpreter, since
Triton is imported either to compile or to interpret.

The interpreter rounds a product before it adds to it, where a GPU's fused multiply-add does not; so
it is given the processor's. All else is its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# nothing here may import Triton, or what does, before `_begin`


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process that interprets Triton, which takes functions of this file."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin) as process:
        yield process


def _begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from numba import njit
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from jobs import triton_window
    from jobs.vector_memory import load, store
    from jobs.vectors import LANES, fma

    triton_window.TILE = 32, 128  # the interpreter is slow in starting programs
    torch.set_num_threads(1)

    @njit
    def fused(a: Any, b: Any, c: Any) -> Any:
        sums = np.empty_like(a)
        for at in range(0, a.size, LANES):
            store(sums, at, fma(load(a, at), load(b, at), load(c, at)))
        return sums

    def create_fma(_: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        assert x.data.dtype == y.data.dtype == z.data.dtype == np.float32
        length = -(-x.data.size // LANES) * LANES
        sums = fused(*(np.resize(one.data, length) for one in (x, y, z)))
        return TensorHandle(sums[: x.data.size].reshape(x.data.shape), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


def count(logits: np.ndarray, target: np.ndarray, bins: int, block: int | None = None) -> Any:
    """What `count_on_gpu` counts, with `block` pixels a program."""
    import torch

    from jobs import triton_counts

    before = triton_counts.BLOCK
    triton_counts.BLOCK = block or before
    try:
        return triton_counts.count_on_gpu(torch.from_numpy(logits), torch.from_numpy(target), bins)
    finally:
        triton_counts.BLOCK = before


def train(task: Path) -> int:
    """The job of a task file, which takes the interpreter for a GPU."""
    from jobs import train as job

    job.require_gpu = lambda *_: None
    return job.main([str(task)])


def resized(
    image: np.ndarray, label: np.ndarray, rows: Any, columns: Any, crop: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The window of whole pictures, in the upper left of a crop."""
    from jobs.augment import Unresized
    from jobs.batches import UnresizedBatch
    from jobs.crop_window import Window

    window = Window(rows, columns)
    needed = np.s_[slice(*window.rows.needed), slice(*window.columns.needed)]
    sample = Unresized(window, image[needed], label[needed])
    return _arrays(UnresizedBatch.of([sample], crop, range(1)))


def batches(folder: Path, protocol: Any, steps: range, rank: int, world_size: int) -> list[Any]:
    """The batches of these steps, as they are on the GPU."""
    from data_prep.manifest import Manifest
    from data_prep.shards import SplitReader
    from jobs.batches import TrainingBatches

    reader = SplitReader(Manifest.load(folder), "train")
    found = TrainingBatches(reader, protocol, 0, rank, world_size)
    return [_arrays(found[step]) for step in steps]


def _arrays(batch: Any) -> tuple[np.ndarray, np.ndarray]:
    import torch

    made = batch.to(torch.device("cpu"))
    return made.images.numpy(), made.target.numpy()
