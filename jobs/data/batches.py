"""The batch of step i: a function of (seed, i) alone, whichever step training starts at, however
many loader processes prepare it, and however many ranks share it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_prep.shards.reader import Bytes, SplitReader
from jobs.data.transforms import Draw, augmented_sample, evaluation_view, resized
from jobs.spec.protocol import Protocol

# The order of an epoch is drawn under a sample number that no sample has.
_ORDER = 2**32 - 1


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch. images: uint8 [b, 3, h, w]; target: uint8 [b, h, w];
    positions: the places of its images in the global batch."""

    images: Tensor
    target: Tensor
    positions: range

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU reads by itself."""
        return replace(self, images=self.images.pin_memory(), target=self.target.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; nobody waits for it if it comes from pinned memory."""
        images, target = (t.to(device, non_blocking=True) for t in (self.images, self.target))
        return replace(self, images=images, target=target)


class Transfer:
    """Brings batches to `device`: to a GPU on a stream of their own, beside what it still computes
    of the step before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, for the stream that is current."""
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in (moved.images, moved.target):  # which are the other stream's until then
            tensor.record_stream(current)
        return moved


class TrainingBatches:
    """Indexed by step."""

    def __init__(
        self, reader: SplitReader, protocol: Protocol, seed: int, rank: int, world_size: int
    ) -> None:
        self.steps_per_epoch = protocol.steps_per_epoch(len(reader))
        self.positions = share(protocol.batch_size, rank, world_size)
        self._reader = reader
        self._protocol = protocol
        self._seed = seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def num_bytes(self) -> int:
        """Bytes of images and target of a `Batch`."""
        height, width = self._protocol.crop
        return 4 * len(self.positions) * height * width

    def __getitem__(self, step: int) -> Batch:
        batch = self.view(step, np.empty(self.num_bytes, np.uint8))
        self.write(step, batch)
        return batch

    def view(self, _step: int, memory: Bytes) -> Batch:
        """Return a batch whose images and target are the `num_bytes` of `memory`."""
        number, crop = len(self.positions), self._protocol.crop
        images, target = torch.from_numpy(memory).split([self.num_bytes * n // 4 for n in (3, 1)])
        return Batch(images.view(number, 3, *crop), target.view(number, *crop), self.positions)

    def write(self, step: int, into: Batch) -> None:
        """Make `into`, whatever it held, the batch of a step."""
        pairs = zip(into.images.numpy(), into.target.numpy(), strict=True)
        for arrays, (epoch, sample) in zip(pairs, self._samples(step), strict=True):
            draw = Draw(self._seed, epoch, sample)
            augmented_sample(self._reader, sample, self._protocol, draw, arrays)

    def _samples(self, step: int) -> list[tuple[int, int]]:
        """The epoch of a step, and a sample's number, for each of its samples."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            drawn = Draw(self._seed, epoch, _ORDER).permutation(len(self._reader))
            self._epoch, self._order = epoch, drawn
        first = within * self._protocol.batch_size
        return [(epoch, int(self._order[first + position])) for position in self.positions]


class EvaluationImages:
    """Validation images one by one: uint8 [3, h, w] and the label map uint8 [h, w]."""

    def __init__(self, reader: SplitReader, protocol: Protocol) -> None:
        self._reader = reader
        self._protocol = protocol

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the largest image of all, with its label map."""
        sizes = {self._reader.size(i) for i in range(len(self._reader))}
        return max((4 * h * w for h, w in (self._resized(*size) for size in sizes)), default=0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.view(index, np.empty(self.num_bytes, np.uint8))
        self.write(index, pair)
        return pair

    def view(self, index: int, memory: Bytes) -> tuple[Tensor, Tensor]:
        """Return image and label map of the size of `index` in the first bytes of `memory`."""
        height, width = self._resized(*self._reader.size(index))
        pixels = height * width
        image, label = torch.from_numpy(memory[: 4 * pixels]).split([3 * pixels, pixels])
        return image.view(3, height, width), label.view(height, width)

    def write(self, index: int, into: tuple[Tensor, Tensor]) -> None:
        """Make `into`, whatever it held, the image and label map of `index`."""
        image, label = (tensor.numpy() for tensor in into)
        read = self._reader.image(index), self._reader.label(index)
        evaluation_view(*read, self._protocol, (image, label))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        return resized(height, width, self._protocol.eval_size, self._protocol.long_side)


def share(batch_size: int, rank: int, world_size: int) -> range:
    """The places in the global batch that belong to `rank`: contiguous, even up to one."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
