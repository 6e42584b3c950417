"""Bilinear resizing with a gradient that a GPU computes the same way each time.

torch's own adds in any order there; made deterministic, it sorts an index for every pixel. As a
linear map along rows and columns, resizing has the adjoint `rows^T G columns`: two matrix products.
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
    """float [B, C, h, w] -> [B, C, *size], bilinear, without aligned corners."""
    if x.is_cpu or not torch.are_deterministic_algorithms_enabled():
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return Resize.apply(x, size)


class Resize(torch.autograd.Function):
    """`resize` where deterministic algorithms were asked for on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Size) -> Tensor:
        ctx.before, ctx.after = x.shape[-2:], size
        # past torch's function, which would take the slow way forward too
        return torch.ops.aten.upsample_bilinear2d(x, size, False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """R^T G C: the transposes of what interpolates rows and columns."""
        (gradient,) = gradients
        half = gradient.dtype in (torch.float16, torch.bfloat16)
        wide = gradient.float() if half else gradient
        rows, columns = (
            _transposed(before, after, wide)
            for before, after in zip(ctx.before, ctx.after, strict=True)
        )
        return (rows @ (wide @ columns.T)).to(gradient.dtype), None


def _transposed(before: int, after: int, like: Tensor) -> Tensor:
    """The matrix of resizing along one axis, transposed, [before, after]: what becomes of the unit
    vectors."""
    units = torch.eye(before, dtype=like.dtype, device=like.device)
    return torch.ops.aten.upsample_linear1d(units[None], [after], False)[0]


class PooledBranch(ASPPPooling):
    """DeepLabV3's pooling branch: torchvision's, but for the gradient of its resizing, and for how
    its output is laid out."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = x
        for module in self:
            pooled = module(pooled)
        return alike(resize(pooled, (x.shape[-2], x.shape[-1])), x)


def replace_resizing(module: nn.Module) -> None:
    """Make torchvision's pooling branch inside `module` ours, keeping its state."""
    for child in module.modules():
        if isinstance(child, ASPPPooling):
            child.__class__ = PooledBranch
