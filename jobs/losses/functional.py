"""The loss functions, on log-probabilities of the whole batch or of one rank's share of it.

Every function takes `log_probs`, float [B, C, H, W], the log-softmax of the logits, and `target`,
int64 [B, H, W] with classes 0 to C - 1 where the mask `labelled`, bool [B, H, W], is true. Other
pixels are void: they count nowhere, and hold a number that is no class. It returns this rank's part
of the loss: sums and normalisers are those of the global batch, so the parts of all ranks add up to
the value that one rank computes on the whole batch, and so do their gradients.
`global_sum` adds a tensor over all ranks; it is the identity where there is one.

A batch without a labelled pixel has a finite value and a zero gradient. Formulas: the paper's
section 2 (Taubert et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jobs.losses.grammar import defaults
from jobs.losses.pooling import SHARE, P, pooling_weights

DICE_SMOOTHING = 1.0
DICE_EPSILON = 1e-5
(FOCAL_GAMMA,) = defaults("FL")
TVERSKY = defaults("TL")

GlobalSum = Callable[[Tensor], Tensor]


def alone(value: Tensor) -> Tensor:
    """The `global_sum` of a single rank."""
    return value


def cross_entropy(
    log_probs: Tensor,
    target: Tensor,
    labelled: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
) -> Tensor:
    """sum -w_c log p / sum w_c over labelled pixels: torch's `CrossEntropyLoss(weight=...)`."""
    log_p, weight = _true_class(log_probs, target, labelled, class_weights)
    return _weighted_mean(-log_p, weight, global_sum)


def focal(
    log_probs: Tensor,
    target: Tensor,
    labelled: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
    gamma: float = FOCAL_GAMMA,
) -> Tensor:
    """sum -w_c (1 - p)^gamma log p / sum w_c over labelled pixels (Lin et al. 2017, without
    alpha)."""
    log_p, weight = _true_class(log_probs, target, labelled, class_weights)
    return _weighted_mean(_focal_of_pixels(log_p, gamma), weight, global_sum)


def pooled_cross_entropy(
    log_probs: Tensor,
    target: Tensor,
    labelled: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
    p: float = P,
    share: float = SHARE,
) -> Tensor:
    """The cross entropy of pixels, max-pooled over all labelled pixels of the global batch; `p` and
    `share` are those of `pooling_weights`."""
    log_p, weight = _true_class(log_probs, target, labelled, class_weights)
    return _pooled_mean(-log_p, weight, labelled, global_sum, p, share)


def pooled_focal(
    log_probs: Tensor,
    target: Tensor,
    labelled: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
    gamma: float = FOCAL_GAMMA,
    p: float = P,
    share: float = SHARE,
) -> Tensor:
    """The focal loss of pixels, max-pooled over all labelled pixels of the global batch; `p` and
    `share` are those of `pooling_weights`."""
    log_p, weight = _true_class(log_probs, target, labelled, class_weights)
    return _pooled_mean(_focal_of_pixels(log_p, gamma), weight, labelled, global_sum, p, share)


def dice(
    log_probs: Tensor,
    target: Tensor,
    labelled: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
) -> Tensor:
    """1 - 2 (sum_c w_c sum p g + s) / (sum_c w_c sum (g^2 + p^2) + s + eps), per image over its
    labelled pixels, then the mean over the images of the batch. A perfect prediction lands
    slightly below 0, an image without a labelled pixel near -1.
    """
    log_p, weight = _true_class(log_probs, target, labelled, class_weights)
    squares = sum_of_powers(log_probs, labelled.unsqueeze(1), 2)  # [B, C]
    if class_weights is not None:
        squares = squares * class_weights.to(squares)
    overlap = (weight * log_p.exp()).sum(dim=(1, 2))
    total = weight.sum(dim=(1, 2)) + squares.sum(dim=1)
    per_image = 1 - 2 * (overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING + DICE_EPSILON)
    return _mean_over_images(per_image, global_sum)


def tversky(
    log_probs: Tensor,
    target: Tensor,
    labelled: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
    alpha: float = TVERSKY[0],
    beta: float = TVERSKY[1],
) -> Tensor:
    """1 - (TP + s) / (TP + alpha FP + beta FN + s) of each class and image over its labelled
    pixels, TP = sum p g, FP = sum p (1 - g), FN = sum (1 - p) g, s = 1; the class-weighted mean
    over classes, then the mean over the images of the batch (Salehi et al. 2017). Class by class,
    since over all classes together FP and FN are the same number.
    """
    labelled = labelled.unsqueeze(1)
    classes = torch.arange(log_probs.shape[1], device=target.device)[:, None, None]
    truth = target.unsqueeze(1) == classes  # false for void
    hits = sum_of_powers(log_probs, truth, 1)  # [B, C]
    false_alarms = sum_of_powers(log_probs, labelled, 1) - hits
    misses = truth.sum(dim=(2, 3)) - hits
    found = hits + DICE_SMOOTHING
    per_class = 1 - found / (found + alpha * false_alarms + beta * misses)
    if class_weights is None:
        per_image = per_class.mean(dim=1)
    else:
        weight = class_weights.to(per_class)
        per_image = per_class @ (weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny))
    return _mean_over_images(per_image, global_sum)


# Every loss above takes (log_probs, target, labelled, class_weights, global_sum, and its own
# parameters, if it has any). class_weights: [C], or None for equal ones.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "CE": cross_entropy,
    "CEMP": pooled_cross_entropy,
    "DL": dice,
    "FL": focal,
    "FLMP": pooled_focal,
    "TL": tversky,
}


def _true_class(
    log_probs: Tensor, target: Tensor, labelled: Tensor, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log p of the true class and its weight, both [B, H, W]; both 0 where the pixel is void."""
    index = torch.where(labelled, target, 0)
    log_p = log_probs.gather(1, index.unsqueeze(1)).squeeze(1)
    # where, not a product: what a void pixel holds must not reach the value, be it infinite
    log_p = torch.where(labelled, log_p, 0.0)
    weight = labelled.to(log_probs.dtype)
    if class_weights is not None:
        weight = weight * class_weights.to(log_probs)[index]
    return log_p, weight


def _weighted_mean(values: Tensor, weight: Tensor, global_sum: GlobalSum) -> Tensor:
    total = global_sum(weight.sum())
    return (weight * values).sum() / torch.where(total > 0, total, 1.0)


def _focal_of_pixels(log_p: Tensor, gamma: float) -> Tensor:
    missed = -torch.expm1(log_p)
    if gamma < 1:  # such a power has an infinite slope at 0, where void pixels are
        missed = missed.clamp(min=torch.finfo(missed.dtype).tiny)
    return missed**gamma * -log_p


def _mean_over_images(per_image: Tensor, global_sum: GlobalSum) -> Tensor:
    images = global_sum(per_image.new_full((), len(per_image)))
    return per_image.sum() / images


def _pooled_mean(
    values: Tensor, weight: Tensor, labelled: Tensor, global_sum: GlobalSum, p: float, share: float
) -> Tensor:
    """Class weights multiply the losses before they are pooled, scaled so that pooling over all
    pixels gives the weighted mean."""
    weight = weight[labelled].double()
    number, total = global_sum(torch.stack([weight.new_full((), len(weight)), weight.sum()]))
    weight = weight * (number / torch.where(total > 0, total, 1.0))
    pooling = pooling_weights(values.detach()[labelled].double() * weight, global_sum, p, share)
    # spread out instead of picking the labelled losses, which would keep where each of them lies
    shares = torch.zeros_like(values)
    shares[labelled] = (pooling * weight).to(values)
    return (shares * values).sum()


def sum_of_powers(log_probs: Tensor, where: Tensor, power: int) -> Tensor:
    """Return the sum of p^power over the pixels at `where`, for each image and class, [B, C].

    It keeps only `log_probs` for the backward pass, which log-softmax keeps anyway: no tensor of a
    batch is larger. Values elsewhere, infinite ones too, reach neither the value nor the gradient.

    Args:
        log_probs: float [B, C, H, W].
        where: bool [B, 1 or C, H, W].
        power: at least 1.
    """
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
