"""Batch norm over the global batch, the same code at every world size.

torch's SyncBatchNorm refuses the CPU, and plain batch norm refuses DeepLabV3's pooling branch with
one image per rank. Count, mean and M2 of all ranks go through one gather and are merged in rank
order (Chan, Golub, LeVeque 1979). The result is the one-rank value up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_SPACE = (0, 2, 3)


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batch of all ranks of `group`; None is this process alone.

    Its state dict has the names and shapes of torch's.
    """

    group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, float [B, C, H, W], per channel."""
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0,
                self.eps,
            )  # fmt: skip
        # statistics and their sums stay in float32 under autocast
        half = input.dtype in (torch.float16, torch.bfloat16)
        wide = input.float() if half else input
        output, mean, variance, count = _Normalise.apply(
            wide, self.weight, self.bias, self.eps, self.group
        )
        self._track(mean, variance, count)
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        unbiased = variance * (count / (count - 1).clamp(min=1))
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalise x [B, C, H, W] over the images of all ranks.

        Returns the result, mean [C], biased variance [C], and number of pixels [].
        """
        mean, variance, count = _global_moments(x, group)
        invstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias; the last two of this rank's images only."""
        grad = gradients[0]
        x, weight, mean, invstd, count = ctx.saved_tensors
        centred = x - mean[:, None, None]
        local = torch.stack([grad.sum(_SPACE), (grad * centred).sum(_SPACE) * invstd])
        whole = local
        if _size(ctx.group) > 1:
            whole = local.clone()
            dist.all_reduce(whole, group=ctx.group)
        # dx = w / sigma (dy - mean(dy) - xhat mean(dy xhat))
        scale = weight * invstd
        by_x = -scale * invstd * whole[1] / count
        constant = -scale * whole[0] / count
        dx = centred.mul_(by_x[:, None, None]).addcmul_(grad, scale[:, None, None])
        return dx.add_(constant[:, None, None]), local[1], local[0], None, None


def _global_moments(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean [C], biased variance [C] and count [] of the pixels of all ranks."""
    channels = x.shape[1]
    count = x.new_full((), x.numel() // channels)  # `new_tensor` would wait for the GPU
    if x.numel():
        mean = x.mean(_SPACE)
        # torch.var_mean is a scalar loop on the CPU; this is 3 times as fast and as exact
        variance = (x - mean[:, None, None]).square_().mean(_SPACE)
    else:  # a rank without images still takes part in the gather
        variance = mean = x.new_zeros(channels)
    if _size(group) == 1:
        return mean, variance, count
    mine = torch.cat([count[None], mean, variance * count])
    gathered = mine.new_empty(_size(group) * mine.numel())
    dist.all_gather_into_tensor(gathered, mine, group=group)
    counts, means, m2 = gathered.view(_size(group), -1).split([1, channels, channels], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (m2 + counts * (means - mean) ** 2).sum(0) / total
    return mean, variance, total


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def replace_batchnorm(
    module: nn.Module, momentum: float, group: dist.ProcessGroup | None = None
) -> None:
    """Replace every `nn.BatchNorm2d` inside `module`, keeping its state.

    All get one momentum: 0.01 of torchvision's mobilenet_v3 is too slow for short runs.
    """
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.__class__ = BatchNorm2d
        if isinstance(child, BatchNorm2d):
            child.momentum = momentum
            child.group = group
