"""Backbones and heads: torchvision's own modules, so that published weights fit, and a U-Net's
decoder, with batch norm and dropout that do not depend on how the batch is spread over ranks."""

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
from jobs.models.memory_format import laid_out
from jobs.models.registry import FEATURES, MODELS
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

Features = Tensor | list[Tensor]  # a list where `FEATURES` has several numbers of channels


class Backbone(nn.Module):
    """Normalised images [B, 3, H, W] -> features [B, `FEATURES`, H / 8 or 16, W / 8 or 16], or for
    a pyramid a list of them, at strides 2, 4, 8, 16 and 32. Its state has torchvision's names
    behind `backbone.`."""

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
    """A whole network: images -> logits at the backbone's stride."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = head

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.backbone(images))


def build_backbone(
    name: str, seed: int, momentum: float, group: dist.ProcessGroup | None = None
) -> Backbone:
    """A backbone with random weights drawn from (seed, name)."""
    with seeded(f"{seed}/{name}"):
        backbone = Backbone(name)
    replace_batchnorm(backbone, momentum, group)
    return backbone


def build_head(
    model: str, num_classes: int, seed: int, momentum: float,
    group: dist.ProcessGroup | None = None,
) -> nn.Module:  # fmt: skip
    """The head of `model`, its weights drawn from (seed, model), so that losses are compared on
    common random numbers. Features -> logits [B, num_classes, h, w]."""
    architecture = MODELS[model]
    with seeded(f"{seed}/{model}"):
        head = _HEADS[architecture.head](FEATURES[architecture.backbone], num_classes)
    replace_batchnorm(head, momentum, group)
    replace_dropout(head)
    replace_resizing(head)
    replace_dilated(head)
    return head


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, with ImageNet's mean and standard deviation, laid out as a
    network wants it."""
    mean, std = _statistics(images.device)
    return laid_out((images.float() / 255 - mean) / std)


@lru_cache(maxsize=4)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation, [3, 1, 1]; to bring them to a GPU waits for it."""
    mean, std = (
        torch.tensor(numbers, dtype=torch.float32, device=device)[:, None, None]
        for numbers in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return mean, std


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, to `size` (height, width) in pixels, as torchvision's segmentation models do."""
    # few, and all that follows goes class by class
    return resize(logits.contiguous(), size)


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Draw torch's random numbers from `text` inside the block; the global state is untouched."""
    with torch.random.fork_rng(devices=[]):
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        yield
