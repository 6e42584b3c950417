"""Build one training step of a bundle as `jobs.train` does it, and as the published code does it.

Both use random weights and one random batch, on the device of the process group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import segmentation

from benchmarks.measure import Work
from hpc.distributed.launcher import RankEnv
from hpc.distributed.process_group import Group, process_group
from jobs.data.batches import Batch, share
from jobs.losses.grammar import parse_loss
from jobs.models.build import Backbone, Features, build_backbone, normalise
from jobs.models.memory_format import place
from jobs.spec.cell import Cell
from jobs.spec.protocol import Protocol
from jobs.train import features
from jobs.training.backbone import freeze
from jobs.training.cell_trainer import CellTrainer, autocast
from jobs.training.torch_settings import configure_torch

# the losses of the paper's table
LOSSES = (
    "WCE", "WDL", "FL", "CEMP", "DLCE", "WDLCE", "DLWCE", "WDLWCE", "DLNCE", "DLACE", "WDLNCE",
    "WDLACE", "DLNWCE", "DLAWCE", "WDLNWCE", "WDLAWCE",
)  # fmt: skip
CLASSES = 21


class Job:
    """A bundle without a data set: a backbone, cells, and one batch."""

    def __init__(self, model: str, group: Group, protocol: Protocol) -> None:
        self.model, self.group, self.protocol = model, group, protocol
        self._taken = 0
        draw = torch.Generator().manual_seed(0)
        number, crop = protocol.batch_size, protocol.crop
        images = torch.randint(256, (number, 3, *crop), generator=draw, dtype=torch.uint8)
        target = torch.randint(CLASSES, (number, *crop), generator=draw, dtype=torch.uint8)
        mine = share(number, group.rank, group.world_size)
        own = slice(mine.start, mine.stop)
        self.batch = Batch(images[own], target[own], mine).to(group.device)
        self.target = self.batch.target.long()
        backbone = settled(model.partition("_")[2], images.to(group.device))
        self.backbone = place(backbone, group.device, protocol.precision)
        freeze(self.backbone, self._cell("CE"))

    def cells(self, losses: Sequence[str], model: str = "") -> list[CellTrainer]:
        """Return a new trainer for each loss, of the job's model or another one."""
        return [
            CellTrainer(self._cell(loss, model), CLASSES, np.ones(CLASSES), self.group)
            for loss in losses
        ]

    def pass_backbone(self) -> Features:
        """Return the features of the batch, which all cells share."""
        with self.group.watch.part("backbone"):
            return features(self.backbone, self.batch.images, self._cell("CE"), self.group)

    def step(self, trainers: Sequence[CellTrainer]) -> None:
        """Train all `trainers` for one more step, in the middle of their schedules.

        Dropout is drawn anew in each step. Raises `RuntimeError` if a loss is not finite.
        """
        self._taken += 1
        inputs = self.pass_backbone()
        for trainer in trainers:
            trainer.step(inputs, self.batch, self.target, self._taken, 2 * self._taken)
            if trainer.failure:
                raise RuntimeError(f"{trainer.cell.name} stopped: {trainer.failure}")

    def _cell(self, loss: str, model: str = "") -> Cell:
        return Cell(
            dataset="random", data="0" * 16, model=model or self.model, loss=parse_loss(loss),
            seed=0, protocol=self.protocol,
        )  # fmt: skip


def settled(name: str, images: Tensor) -> Backbone:
    """Return a backbone of random weights with the batch statistics of `images`.

    `images` is uint8 [b, 3, h, w]. With initial statistics the activations double in each block
    and overflow float16.
    """
    backbone = build_backbone(name, 0, momentum=1.0).to(images.device)
    with torch.no_grad():
        backbone.train()(normalise(images))
    return backbone


@contextmanager
def ready(protocol: Protocol, env: RankEnv | None = None) -> Iterator[Group]:
    """Start a process group with the torch settings of `protocol`; without `env` of one rank.

    Raises `UserError` if torch has no kernels for the GPU.
    """
    configure_torch(protocol)
    env = env or RankEnv("single", 0, 1, 0, node="", job_id="", start_id="")
    with TemporaryDirectory() as folder, process_group(env, Path(folder)) as group:
        yield group


def published(job: Job, half: torch.dtype | None = None) -> Work:
    """Return a training step as the published code does it, one run for each model.

    The backbone is in train mode, the backward pass covers the whole network, and the optimiser
    holds the head only. The model is torchvision's, the loss torch's cross entropy. It computes in
    float32, or with `half` in that type under autocast.
    """
    device = job.group.device
    network: nn.Module = getattr(segmentation, job.model)(
        weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=False
    ).to(device)
    network.train()
    optimizer = torch.optim.SGD(
        network.classifier.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4
    )
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    images: Tensor = job.batch.images.float() / 255

    def step() -> None:
        optimizer.zero_grad()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):  # torch's default
            with autocast(device, half):
                loss = criterion(network(images)["out"], job.target)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step
