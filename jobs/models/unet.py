"""The decoder of a U-Net (Ronneberger, Fischer, Brox 2015) on the features of a ResNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jobs.models.memory_format import alike
from jobs.models.resize import resize

_WIDTHS = (256, 128, 64, 32)  # channels of the blocks, coarsest first


class UNetHead(nn.Module):
    """Five feature maps, finest first -> logits [B, num_classes, h, w] of the finest one's size.

    Each map is half as large as the one before, rounded up. Starting from the coarsest, each step
    enlarges features to the next finer size, concatenates both, and applies a block.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        *skips, coarsest = channels
        blocks, below = [], coarsest
        for skip, width in zip(reversed(skips), _WIDTHS, strict=True):
            blocks.append(_block(below + skip, width))
            below = width
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Conv2d(below, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *skips, x = features
        for skip, block in zip(reversed(skips), self.blocks, strict=True):
            x = alike(resize(x, (skip.shape[-2], skip.shape[-1])), skip)
            x = block(torch.cat([skip, x], dim=1))
        return self.classifier(x)


def _block(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
    )  # fmt: skip
