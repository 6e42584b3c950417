"""A trained cell as a function from an image to a label map."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hpc.command import UserError
from hpc.groups import Group
from jobs.augment import evaluation_view
from jobs.backbone import load_backbone, read_tensors
from jobs.cell import Cell, RunPaths
from jobs.models.build import Network, build_head, normalise, upsample
from jobs.models.layout import place


class Prediction(NamedTuple):
    """labels: uint8 [H, W], class indices. confidence: float32 [H, W], the highest softmax score,
    in [0, 1]."""

    labels: NDArray[np.uint8]
    confidence: NDArray[np.float32]


class Predictor:
    """The network of a trained cell, in evaluation mode. Raises `UserError` if the file is not a
    trained head, or its backbone is missing or another one."""

    def __init__(self, head: Path, paths: RunPaths, group: Group) -> None:
        content = _read(head)
        self.cell: Cell = content["cell"]
        self.classes: list[str] = content["classes"]
        momentum = self.cell.protocol.batchnorm_momentum
        backbone = load_backbone(self.cell, paths, group)
        if backbone.sha256 != content["backbone_sha256"]:
            raise UserError(
                f"{head} was trained on another backbone than the one that is there now"
            )
        module = build_head(self.cell.model, len(self.classes), self.cell.seed, momentum)
        network = Network(backbone.module, module)
        trained: nn.Module = network if self.cell.protocol.train == "all" else module
        try:
            trained.load_state_dict(content["weights"])
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{head} holds weights of another network; train it again") from error
        self._network = place(network, group.device).eval()
        self._device = group.device

    @torch.no_grad()
    def predict(self, image: NDArray[np.uint8]) -> Prediction:
        """Label map and confidences of an RGB image, uint8 [H, W, 3], at the image's own size; the
        network sees it at the size that validation images had."""
        height, width = image.shape[:2]
        blank = np.zeros((height, width), np.uint8)
        seen, _ = evaluation_view(np.ascontiguousarray(image), blank, self.cell.protocol.eval_size)
        pixels = torch.from_numpy(seen)[None].to(self._device)
        logits = upsample(self._network(normalise(pixels)), (height, width))[0]
        confidence, labels = logits.softmax(0).max(0)
        return Prediction(labels.to(torch.uint8).cpu().numpy(), confidence.cpu().numpy())


def _read(head: Path) -> dict[str, Any]:
    try:
        content = read_tensors(head)
        content["classes"], content["weights"], content["backbone_sha256"]
        return {**content, "cell": Cell.model_validate(content["cell"])}
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise UserError(
            f"{head} is not a trained head ({type(error).__name__}); give one of a run's heads/"
        ) from error
