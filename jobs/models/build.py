"""Build backbones and heads: torchvision's modules, so that published weights fit, and a U-Net.

Their batch norm and dropout do not depend on how the batch is spread over ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models import resnet50, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from jobs.models.dilated import replace_dilated
from jobs.models.dropout import replace_dropout
from jobs.models.registry import FEATURE_CHANNELS, MODELS
from jobs.models.resize import replace_resizing, resize
from jobs.models.sync_batchnorm import replace_batchnorm
from jobs.models.unet import UNetHead

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_BUILDERS = {
    "resnet50": segmentation.deeplabv3_resnet50,
    "resnet101": segmentation.deeplabv3_resnet101,
    "mobilenet_v3_large": segmentation.deeplabv3_mobilenet_v3_large,
}
_PYRAMID = {"relu": "2", "layer1": "4", "layer2": "8", "layer3": "16", "layer4": "32"}
_HEADS: dict[str, Callable[[Any, int], nn.Module]] = {
    "fcn": FCNHead,
    "deeplabv3": DeepLabHead,
    "unet": UNetHead,
}

Features = Tensor | list[Tensor]  # a list if `FEATURE_CHANNELS` has several numbers of channels


class Backbone(nn.Module):
    """Normalised images [B, 3, H, W] -> features [B, `FEATURE_CHANNELS`, H / stride, W / stride].

    The stride is 8 or 16. A pyramid gives a list of features at strides 2, 4, 8, 16 and 32. Names
    in the state dict are torchvision's after the prefix `backbone.`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name in _BUILDERS:
            model = _BUILDERS[name](weights=None, weights_backbone=None, num_classes=2)
            self.backbone = model.backbone
        else:
            self.backbone = IntermediateLayerGetter(resnet50(weights=None), _PYRAMID)

    def forward(self, images: Tensor) -> Features:
        features = self.backbone(images)
        return features["out"] if "out" in features else list(features.values())


class Network(nn.Module):
    """A whole network: normalised images [B, 3, H, W] -> logits at the backbone's stride."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = head

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.backbone(images))


def build_backbone(
    name: str, seed: int, momentum: float, group: dist.ProcessGroup | None = None
) -> Backbone:
    """Return a backbone with random weights, a function of (seed, name)."""
    with seeded(f"{seed}/{name}"):
        backbone = Backbone(name)
    replace_batchnorm(backbone, momentum, group)
    return backbone


def build_head(
    model: str, num_classes: int, seed: int, momentum: float,
    group: dist.ProcessGroup | None = None,
) -> nn.Module:  # fmt: skip
    """Return the head of `model`: features -> logits [B, num_classes, h, w].

    Its weights are a function of (seed, model), so that losses start from the same weights.
    """
    architecture = MODELS[model]
    with seeded(f"{seed}/{model}"):
        head = _HEADS[architecture.head](FEATURE_CHANNELS[architecture.backbone], num_classes)
    replace_batchnorm(head, momentum, group)
    replace_dropout(head)
    replace_resizing(head)
    replace_dilated(head)
    return head


def normalise(images: Tensor) -> Tensor:
    """Normalise uint8 images [B, 3, H, W] by ImageNet's mean and standard deviation, to float32."""
    mean, std = _statistics(images.device)
    return (images.float() / 255 - mean) / std


@lru_cache(maxsize=4)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    # cached, because a copy to a GPU waits for it
    mean, std = (
        torch.tensor(numbers, dtype=torch.float32, device=device)[:, None, None]
        for numbers in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return mean, std


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits [B, C, h, w] bilinearly to `size`, (height, width) in pixels."""
    # contiguous, because losses and counts read class by class; before the resize a copy is cheap
    return resize(logits.contiguous(), size)


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Seed torch's CPU generator by `text` inside the block; the global state stays untouched."""
    with torch.random.fork_rng(devices=[]):
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        yield
