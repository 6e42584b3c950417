"""Label images with a trained cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpc.cli import UserError
from hpc.distributed.process_group import Group
from jobs.data.batches import resized_for_evaluation
from jobs.metrics.reference import lowest_argmax
from jobs.models.build import Network, build_head, normalise, upsample
from jobs.models.memory_format import place
from jobs.spec.cell import Cell
from jobs.spec.run_paths import RunPaths
from jobs.training.backbone import load_backbone, moving_buffers, read_tensors
from jobs.training.torch_settings import configure_torch


class Prediction(NamedTuple):
    """The prediction for one image.

    Attributes:
        labels: uint8 [H, W], class indices.
        confidence: float32 [H, W], the highest softmax score, in [0, 1].
    """

    labels: NDArray[np.uint8]
    confidence: NDArray[np.float32]


class Predictor:
    """The network of a trained cell.

    On the same type of machine its logits have the same bits as in evaluation.

    It sets torch's threads, determinism and precision for the whole process, by the cell's
    protocol. It raises `UserError` if the file is not a trained head, or if its backbone is missing
    or another one.
    """

    def __init__(self, head: Path, paths: RunPaths, group: Group) -> None:
        content = _read(head)
        self.cell: Cell = content["cell"]
        self.classes: list[str] = content["classes"]
        protocol = self.cell.protocol
        configure_torch(protocol)
        backbone = load_backbone(self.cell, paths, group)
        if backbone.sha256 != content["backbone_sha256"]:
            raise UserError(
                f"{head} was trained on another backbone than the one that is there now; "
                "restore that backbone, or train the cell again"
            )
        module = build_head(
            self.cell.model, len(self.classes), self.cell.seed, protocol.batchnorm_momentum
        )
        network = Network(backbone.module, module)
        trained: nn.Module = network if protocol.train == "all" else module
        try:
            trained.load_state_dict(content["weights"])
            _load_buffers(moving_buffers(backbone.module, protocol), content["backbone"], head)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise UserError(f"{head} holds weights of another network; train it again") from error
        self._network = place(network, group.device, protocol.precision).eval()
        self._device = group.device

    def predict(self, image: NDArray[np.uint8]) -> Prediction:
        """Return labels and confidences at the size of the image, RGB uint8 [H, W, 3]."""
        scores = upsample(self.logits(image), (image.shape[0], image.shape[1]))[0]
        labels, confidence = lowest_argmax(scores), scores.softmax(0).amax(0)
        return Prediction(labels.to(torch.uint8).cpu().numpy(), confidence.cpu().numpy())

    @torch.no_grad()
    def logits(self, image: NDArray[np.uint8]) -> Tensor:
        """Return logits [1, C, h, w] of an RGB image, uint8 [H, W, 3].

        The image is resized as validation images were.
        """
        blank = np.zeros(image.shape[:2], np.uint8)
        seen, _ = resized_for_evaluation(np.ascontiguousarray(image), blank, self.cell.protocol)
        logits: Tensor = self._network(normalise(torch.from_numpy(seen)[None].to(self._device)))
        return logits


def _load_buffers(buffers: Mapping[str, Tensor], found: Mapping[str, Tensor], head: Path) -> None:
    if {name: t.shape for name, t in buffers.items()} != {n: t.shape for n, t in found.items()}:
        fault = "holds those of another backbone" if found else "holds none"
        raise UserError(
            f"{head} does not hold the running statistics that its backbone had in training: it "
            f"{fault}; train it again"
        )
    for name, buffer in buffers.items():
        buffer.copy_(found[name])


def _read(head: Path) -> dict[str, Any]:
    try:
        content = read_tensors(head)
        content["classes"], content["weights"], content["backbone_sha256"], content["backbone"]
        return {**content, "cell": Cell.model_validate(content["cell"])}
    except Exception as error:  # torch raises many types for a file of another format
        raise UserError(
            f"{head} is not a trained head ({type(error).__name__}); give one of a run's heads/"
        ) from error
