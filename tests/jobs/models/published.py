"""Files of published names, with the tensors that torchvision's own builders have and made-up
values: each tensor is one number, another for each, so that none can stand in another's place."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import models
from torchvision.models import segmentation

from data_prep.weights import weights_path
from jobs.models.registry import MODELS


def state_of(weights: str, model: str, num_classes: int = 21) -> dict[str, Tensor]:
    """The tensors of the file that `weights` means for `model`; of a few bytes each."""
    with torch.device("meta"):
        if weights == "imagenet":
            built = getattr(models, MODELS[model].backbone.removesuffix("_pyramid"))()
        else:
            builder = getattr(segmentation, model)
            built = builder(weights_backbone=None, num_classes=num_classes, aux_loss=True)
    values = torch.Generator().manual_seed(0)
    return {
        name: torch.rand((), generator=values).mul(1000 if tensor.dtype == torch.int64 else 1)
        .to(tensor.dtype).expand(tensor.shape)
        for name, tensor in built.state_dict().items()
    }  # fmt: skip


def publish(weights: str, model: str, num_classes: int = 21, **changes: Tensor | None) -> None:
    """Put that file where torch keeps its weights, with `changes` to its tensors, None being
    without."""
    state = {**state_of(weights, model, num_classes), **changes}
    path = weights_path(weights, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: state[name] for name in state if state[name] is not None}, path)
