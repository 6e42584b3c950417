"""Bilinear resizing whose gradient on a GPU is two matrix products.

Resizing is linear along rows and columns, so its gradient is `rows^T G columns`. torch's own
gradient adds with atomics there, in any order. Its deterministic version sorts an index for every
pixel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPPPooling

from jobs.models.memory_format import alike

Size = tuple[int, int]  # height, width in pixels


def resize(x: Tensor, size: Size) -> Tensor:
    """Resize float [B, C, h, w] bilinearly to [B, C, *size], without aligned corners."""
    if by_products(x.device):
        return Resize.apply(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def by_products(device: torch.device) -> bool:
    """Return whether `resize` has its own gradient; torch's is deterministic on a CPU."""
    return device.type != "cpu"


class Resize(torch.autograd.Function):
    """`resize` with a gradient of two matrix products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Size) -> Tensor:
        ctx.before, ctx.after = x.shape[-2:], size
        # `F.interpolate` would take the slow algorithm forward too
        resized = torch.ops.aten.upsample_bilinear2d(x, size, False)
        return resized.to(x.dtype)  # autocast computes in float32

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return R^T G C, where R and C are the matrices that interpolate rows and columns."""
        (gradient,) = gradients
        half = gradient.dtype in (torch.float16, torch.bfloat16)
        wide = gradient.float() if half else gradient
        rows, columns = (
            _transposed(before, after, wide)
            for before, after in zip(ctx.before, ctx.after, strict=True)
        )
        return (rows @ (wide @ columns.T)).to(gradient.dtype), None


def _transposed(before: int, after: int, like: Tensor) -> Tensor:
    """Return the matrix that resizes along one axis, transposed, [before, after]."""
    units = torch.eye(before, dtype=like.dtype, device=like.device)
    return torch.ops.aten.upsample_linear1d(units[None], [after], False)[0]


class PooledBranch(ASPPPooling):
    """DeepLabV3's pooling branch with `resize`, and with the memory format of its input."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = x
        for module in self:
            pooled = module(pooled)
        return alike(resize(pooled, (x.shape[-2], x.shape[-1])), x)


def replace_resizing(module: nn.Module) -> None:
    """Replace torchvision's pooling branch inside `module`, keeping its state."""
    for child in module.modules():
        if isinstance(child, ASPPPooling):
            child.__class__ = PooledBranch
