"""Processes that prepare batches and images ahead, in order.

torch's loader hands over a tensor in shared memory that is new for each, whose pages the kernel
makes, shows to two processes and takes back: more than half of the time of a batch. So training
batches lie in slots that are made once, before the processes that fill them are forked.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpc.command import UserError
from hpc.preempt import leave_signals_to_the_rank
from jobs.batches import Batch, EvaluationImages, TrainingBatches, UnresizedBatch

_PREFETCH_STEPS = 4  # that a process may be ahead
_IN_USE = 2  # batches that whoever takes them may look at: the last, and the one before


def load_steps(
    batches: TrainingBatches, start: int, stop: int, workers: int
) -> Generator[Batch | UnresizedBatch]:
    """The batches of steps `start` to `stop` - 1, in order, prepared ahead by `workers`
    processes. One stays as it is until the next but one is asked for. Raises `UserError`."""
    steps = range(start, stop)
    workers = min(workers, len(steps))
    if workers == 0 or batches.on_gpu:
        yield from _loaded(batches, steps, workers)
        return
    slots = _Slots(batches, workers * _PREFETCH_STEPS + _IN_USE)
    with closing(_loaded(slots, steps, workers)) as items:
        for item in items:
            yield slots.batch(item.step) if isinstance(item, _Written) else item


def load_images(
    images: EvaluationImages, indices: range, workers: int
) -> Generator[tuple[Tensor, Tensor]]:
    """The evaluation images of `indices`, in order. Raises `UserError`."""
    return _loaded(images, indices, min(workers, len(indices)))


def _loaded(dataset: Dataset, indices: range, workers: int) -> Generator:
    items = DataLoader(
        _Guarded(dataset),
        sampler=indices,
        batch_size=None,  # an item is a whole batch already
        num_workers=workers,
        prefetch_factor=_PREFETCH_STEPS if workers else None,
        worker_init_fn=leave_signals_to_the_rank,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,  # which shares memory, and `_Slots`
    )
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


class _Slots(Dataset["_Written"]):
    """As many batches in memory that this process and those it forks share. That of a step is
    written where the one `number` steps before it was."""

    def __init__(self, batches: TrainingBatches, number: int) -> None:
        self._batches = batches
        size = batches.num_bytes  # 0 on a rank that has no image of a batch
        memory = np.frombuffer(mmap.mmap(-1, max(1, number * size)), np.uint8)
        self._slots = [batches.batch_in(memory[k * size : (k + 1) * size]) for k in range(number)]
        self._key = next(_KEYS)
        _SLOTS[self._key] = self

    def __getitem__(self, step: int) -> _Written:
        self._batches.write(step, self.batch(step))
        return _Written(step, self._key)

    def batch(self, step: int) -> Batch:
        """The slot of a step."""
        return self._slots[step % len(self._slots)]


_KEYS = itertools.count()
_SLOTS: WeakValueDictionary[int, _Slots] = WeakValueDictionary()


@dataclass(frozen=True)
class _Written:
    """What a process says of a batch that it has written."""

    step: int
    slots: int

    def pin_memory(self) -> Batch:
        """The batch, as `Batch.pin_memory` gives it; torch's loader asks for it in a thread of the
        rank's own, and the slot is free then."""
        return _SLOTS[self.slots].batch(self.step).pin_memory()


class _Guarded(Dataset):
    """Hands a `UserError` over as an item: torch would wrap it in the worker's traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> object:
        try:
            return self._dataset[index]
        except UserError as error:
            return error


def _as_it_is(item: object) -> object:
    return item
