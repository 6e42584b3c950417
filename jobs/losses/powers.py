"""Sums of scores to a power that keep nothing for the backward pass but the log-probabilities,
which log-softmax keeps anyway: of a batch these are the largest tensor there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sum_of_powers(log_probs: Tensor, where: Tensor, power: int) -> Tensor:
    """sum p^power over the pixels at `where`, for each image and class: [B, C]. log_probs: float
    [B, C, H, W]; where: bool [B, 1 or C, H, W]. What stands elsewhere reaches neither the value
    nor the gradient, be it infinite."""
    result: Tensor = _SumOfPowers.apply(log_probs, where, power)
    return result


class _SumOfPowers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, where: Tensor, power: int) -> Tensor:
        ctx.save_for_backward(log_probs, where)
        ctx.power = power
        return _powers(log_probs, where, power).sum(dim=(2, 3))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        log_probs, where = ctx.saved_tensors
        powers = _powers(log_probs, where, ctx.power)
        return powers.mul_(ctx.power * gradient[:, :, None, None]), None, None


def _powers(log_probs: Tensor, where: Tensor, power: int) -> Tensor:
    return (power * log_probs).exp_().masked_fill_(~where, 0.0)
