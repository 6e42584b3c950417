"""The batch of step i: a function of (seed, i) alone, whichever step training starts at, however
many loader processes prepare it, and however many ranks share it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.settings import VOID
from data_prep.shards import SplitReader
from hpc.command import UserError
from hpc.preempt import leave_signals_to_the_rank
from jobs.augment import Draw, Unresized, augmented_sample, evaluation_view, unresized_sample
from jobs.protocol import Protocol

# The order of an epoch is drawn under a sample number that no sample has.
_ORDER = 2**32 - 1
_PREFETCH_STEPS = 4


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch. images: uint8 [b, 3, h, w]; target: uint8 [b, h, w];
    positions: the places of its images in the global batch."""

    images: Tensor
    target: Tensor
    positions: range

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU reads by itself; torch's loader asks for it by this
        name."""
        return replace(self, images=self.images.pin_memory(), target=self.target.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; from pinned memory it comes while the GPU goes on working."""
        images, target = (t.to(device, non_blocking=True) for t in (self.images, self.target))
        return replace(self, images=images, target=target)


class Layout(NamedTuple):
    """Lengths of what a sample has in an `UnresizedBatch`: of its `source` in rows and columns, of
    its window, and of the `taps` of either axis."""

    source: tuple[int, int]
    window: tuple[int, int]
    taps: tuple[int, int]
    rows_first: bool

    def of_pixels(self) -> list[int]:
        """Bytes of image and label."""
        pixels = self.source[0] * self.source[1]
        return [3 * pixels, pixels]

    def of_tables(self) -> list[int]:
        """Numbers in first pixels, weights and nearest pixels of rows, then of columns."""
        return [n for size, taps in zip(self.window, self.taps, strict=True)
                for n in (size, size * taps, size)]  # fmt: skip


@dataclass(frozen=True)
class UnresizedBatch:
    """A batch whose images become the `crop`'s size on the GPU: the `pixels` uint8 and `tables`
    int32 of all samples, one after the other as their `layouts` say."""

    pixels: Tensor
    tables: Tensor
    layouts: tuple[Layout, ...]
    crop: tuple[int, int]
    positions: range

    @classmethod
    def of(cls, samples: Sequence[Unresized], crop: tuple[int, int], positions: range) -> Self:
        """The batch of these samples."""
        pixels, tables, layouts = [], [], []
        for window, image, label in samples:
            pixels += [image, label]
            rows, columns = (axis.counted_from(axis.needed[0])
                             for axis in (window.rows, window.columns))  # fmt: skip
            tables += [*rows, *columns]
            taps = rows.weights.shape[1], columns.weights.shape[1]
            layouts.append(Layout(label.shape, window.shape, taps, bool(window.rows_first)))
        flat = _flat(pixels, np.uint8), _flat(tables, np.int32)
        return cls(*flat, tuple(layouts), crop, positions)

    def pin_memory(self) -> UnresizedBatch:
        """As a `Batch`'s."""
        return replace(self, pixels=self.pixels.pin_memory(), tables=self.tables.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch itself, resized on `device`."""
        from jobs import triton_window as gpu  # Triton is only where it is wanted

        pixels, tables = (t.to(device, non_blocking=True) for t in (self.pixels, self.tables))
        images = pixels.new_zeros(len(self.layouts), 3, *self.crop)
        target = pixels.new_full((len(self.layouts), *self.crop), VOID)
        parts = iter(pixels.split([n for layout in self.layouts for n in layout.of_pixels()]))
        numbers = iter(tables.split([n for layout in self.layouts for n in layout.of_tables()]))
        for layout, image, labels in zip(self.layouts, images, target, strict=True):
            (height, width), (rows, columns) = layout.source, layout.window
            source, label = next(parts).view(height, width, 3), next(parts).view(height, width)
            down, across = (
                gpu.AxisOnGpu(next(numbers), next(numbers).view(length, taps), next(numbers))
                for length, taps in zip(layout.window, layout.taps, strict=True)
            )
            gpu.resize_image(source, down, across, layout.rows_first, image)
            labels[:rows, :columns] = gpu.pick(label, down, across)
        return Batch(images, target, self.positions)


def _flat(arrays: Sequence[np.ndarray], dtype: DTypeLike) -> Tensor:
    flat, start = np.empty(sum(array.size for array in arrays), dtype), 0
    for array in arrays:  # each is copied once, though it may be a part of rows
        flat[start : start + array.size].reshape(array.shape)[:] = array
        start += array.size
    return torch.from_numpy(flat)


class TrainingBatches(Dataset[Batch | UnresizedBatch]):
    """Indexed by step."""

    def __init__(
        self, reader: SplitReader, protocol: Protocol, seed: int, rank: int, world_size: int
    ) -> None:
        self.steps_per_epoch = protocol.steps_per_epoch(len(reader))
        self._reader = reader
        self._protocol = protocol
        self._seed = seed
        self._positions = share(protocol.batch_size, rank, world_size)

    def __getitem__(self, step: int) -> Batch | UnresizedBatch:
        epoch, within = divmod(step, self.steps_per_epoch)
        order = Draw(self._seed, epoch, _ORDER).permutation(len(self._reader))
        first = within * self._protocol.batch_size
        samples = [int(order[first + position]) for position in self._positions]
        if self._protocol.augment_on == "gpu":
            found = [self._unresized(epoch, sample) for sample in samples]
            return UnresizedBatch.of(found, self._protocol.crop, self._positions)
        height, width = self._protocol.crop
        images = np.empty((len(samples), 3, height, width), np.uint8)
        target = np.empty((len(samples), height, width), np.uint8)
        for into, sample in zip(zip(images, target, strict=True), samples, strict=True):
            draw = Draw(self._seed, epoch, sample)
            augmented_sample(self._reader, sample, self._protocol, draw, into)
        return Batch(torch.from_numpy(images), torch.from_numpy(target), self._positions)

    def _unresized(self, epoch: int, sample: int) -> Unresized:
        key = Draw(self._seed, epoch, sample)
        return unresized_sample(self._reader, sample, self._protocol, key)


class EvaluationImages(Dataset[tuple[Tensor, Tensor]]):
    """Validation images one by one: uint8 [3, h, w] and the label map uint8 [h, w]."""

    def __init__(self, reader: SplitReader, short_side: int) -> None:
        self._reader = reader
        self._short_side = short_side

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self._reader.image(index), self._reader.label(index)
        image, label = evaluation_view(image, label, self._short_side)
        return torch.from_numpy(image), torch.from_numpy(label)


def share(batch_size: int, rank: int, world_size: int) -> range:
    """The places in the global batch that belong to `rank`: contiguous, even up to one."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def load_steps(
    batches: TrainingBatches, start: int, stop: int, workers: int
) -> Generator[Batch | UnresizedBatch]:
    """The batches of steps `start` to `stop` - 1, in order, prepared ahead by `workers`
    processes."""
    return _loader(batches, range(start, stop), workers)


def load_images(
    images: EvaluationImages, indices: range, workers: int
) -> Generator[tuple[Tensor, Tensor]]:
    """The evaluation images of `indices`, in order."""
    return _loader(images, indices, workers)


def _loader(dataset: Dataset, indices: range, workers: int) -> Generator:
    workers = min(workers, len(indices))
    items = DataLoader(
        _Guarded(dataset),
        sampler=indices,
        batch_size=None,  # an item is a whole batch already
        num_workers=workers,
        prefetch_factor=_PREFETCH_STEPS if workers else None,
        worker_init_fn=leave_signals_to_the_rank,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
    )
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


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
