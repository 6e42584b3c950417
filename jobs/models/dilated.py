"""DeepLabV3's dilated convolutions on a CPU, without the products of padding.

A 3 x 3 kernel dilated by 36 spends 64 of every 100 products on zeros beyond the edges of a map of
60 x 60. oneDNN skips them in channels-last memory format, but not in the gradient of the kernel.
Here that gradient is one matrix product for each tap and each piece of the map. Maps are cut
`dilation` pixels from their edges, so that a tap reads all of a piece or nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP, ASPPConv

from jobs.models.memory_format import by_pixel

# Images with fewer feature values (channels x height x width) take torch's own convolution: their
# steps are short, and published results keep torch's rounding.
LARGE = 500_000

_TAPS = 3  # of a kernel along an axis


class DilatedConv2d(nn.Conv2d):
    """`nn.Conv2d` with a 3 x 3 kernel and padding that keeps the size of a map.

    Results differ from torch's by rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve float [B, C, h, w] to float [B, K, h, w]."""
        if not _is_worth_it(input):
            return super().forward(input)
        return _Convolve.apply(by_pixel(input), self.weight, self.dilation[0])


class DilatedPyramid(ASPP):
    """torchvision's ASPP, whose dilated convolutions share one copy of the features."""

    def forward(self, x: Tensor) -> Tensor:
        """Map float [B, C, h, w] to float [B, 256, h, w]."""
        shared = by_pixel(x) if _is_worth_it(x) else x
        maps = [branch(shared if isinstance(branch, ASPPConv) else x) for branch in self.convs]
        return self.project(torch.cat(maps, dim=1))


def replace_dilated(module: nn.Module) -> None:
    """Replace torchvision's ASPP and its dilated convolutions inside `module`, keeping state."""
    for child in module.modules():
        if isinstance(child, ASPP):
            child.__class__ = DilatedPyramid
        if isinstance(child, ASPPConv):
            child[0].__class__ = DilatedConv2d


def gradient_of_kernel(x: Tensor, gradient: Tensor, dilation: int) -> Tensor:
    """Return the gradient [K, C, 3, 3] of the kernel of a dilated convolution.

    Args:
        x: input [B, C, h, w]; channels-last is fastest.
        gradient: gradient of the output [B, K, h, w]; channels-last is fastest.
        dilation: in pixels; padding is the same.
    """
    pixels, output_gradient = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    channels, kernels = pixels.shape[-1], output_gradient.shape[-1]
    # tap by tap, so that each matrix is aligned: rounding may depend on the alignment
    by_tap = x.new_zeros(_TAPS, _TAPS, kernels, channels)
    for rows in _pieces(x.shape[2], dilation):
        for columns in _pieces(x.shape[3], dilation):
            piece = pixels[:, rows.read, columns.read].reshape(-1, channels)
            for i, down in rows.taps:
                for j, across in columns.taps:
                    written = output_gradient[:, down, across].reshape(-1, kernels)
                    by_tap[i, j].addmm_(written.T, piece)
    return by_tap.permute(2, 3, 0, 1).contiguous()


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        # x is channels-last, the result contiguous as the rest of a head
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return F.conv2d(x, weight, padding=dilation, dilation=dilation).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient, around = by_pixel(gradients[0]), [ctx.dilation, ctx.dilation]
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], around, around, False, [0, 0], 1,
                [True, False, False],
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            by_weight = gradient_of_kernel(x, gradient, ctx.dilation)
        return by_x, by_weight, None


class _Piece(NamedTuple):
    """A run of pixels along an axis: `taps` are (tap, pixels of the output that it writes)."""

    read: slice
    taps: list[tuple[int, slice]]


def _pieces(size: int, dilation: int) -> Iterator[_Piece]:
    cuts = sorted({0, min(dilation, size), max(size - dilation, 0), size})
    for start, end in pairwise(cuts):
        written = [(i, start - by, end - by) for i, by in enumerate((-dilation, 0, dilation))]
        taps = [(i, slice(a, b)) for i, a, b in written if a >= 0 and b <= size]
        yield _Piece(slice(start, end), taps)


def _is_worth_it(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == torch.float32 and x.shape[1:].numel() >= LARGE
