"""The loss functions, and `combined_loss`, which weights the terms of a loss by its schedule.

Every loss function takes the same arguments, and then its own parameters:
    log_probs: float [B, C, H, W], the log-softmax of the logits.
    target: int64 [B, H, W], classes 0 to C - 1 where `labelled` is true, any number elsewhere.
    labelled: bool [B, H, W], false for void pixels, which no loss counts.
    class_weights: [C], or None for equal weights.
    global_sum: sum of a tensor over all ranks. The result carries no gradient, so use it only for
        normalisers and thresholds.

It returns this rank's part of the loss, a scalar. Sums and normalisers are those of the global
batch. So the parts of all ranks, and their gradients, add up to the values of one rank that has the
whole batch. A batch without a labelled pixel has a finite value and a zero gradient.

Formulas: section 2 of the paper (Taubert et al. 2021). In the docstrings p are probabilities, g is
the one-hot target, and w_c is the weight of class c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.losses.grammar import LossSpec, defaults, term_weights
from jobs.losses.pooling import SHARE, P, pooling_weights

DICE_SMOOTHING = 1.0
DICE_EPSILON = 1e-5
(FOCAL_GAMMA,) = defaults("FL")
TVERSKY = defaults("TL")

GlobalSum = Callable[[Tensor], Tensor]


def alone(value: Tensor) -> Tensor:
    """Return `value` without its gradient: the `global_sum` of a single rank."""
    return value.detach()


def inverse_frequencies(class_pixels: Sequence[int]) -> np.ndarray:
    """Return inverse class frequencies, scaled to sum to the number of classes C; float64 [C].

    Args:
        class_pixels: number of training pixels of each class, [C]; 0 gives the weight 0.
    """
    pixels = np.asarray(class_pixels, dtype=np.float64)
    inverse = np.divide(1.0, pixels, out=np.zeros_like(pixels), where=pixels > 0)
    total = inverse.sum()
    return inverse * (len(pixels) / total) if total > 0 else inverse


def cross_entropy(
    log_probs: Tensor,
    target: Tensor,
    labelled: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
) -> Tensor:
    """Return sum -w_c log p / sum w_c over labelled pixels.

    This is torch's `CrossEntropyLoss(weight=...)`.
    """
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
    """Return sum -w_c (1 - p)^gamma log p / sum w_c over labelled pixels.

    Source: Lin et al. 2017, without alpha. `gamma` is at least 0.
    """
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
    """Return the cross entropy, max-pooled over all labelled pixels of the global batch.

    `pooling_weights` explains `p` and `share`.
    """
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
    """Return the focal loss, max-pooled over all labelled pixels of the global batch.

    `pooling_weights` explains `p` and `share`; `gamma` is that of `focal`.
    """
    log_p, weight = _true_class(log_probs, target, labelled, class_weights)
    return _pooled_mean(_focal_of_pixels(log_p, gamma), weight, labelled, global_sum, p, share)


def dice(
    log_probs: Tensor,
    target: Tensor,
    labelled: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
) -> Tensor:
    """Return the Dice loss, the mean over the images of the batch.

    An image has 1 - 2 (sum_c w_c sum p g + s) / (sum_c w_c sum (g^2 + p^2) + s + eps) over its
    labelled pixels, with s = 1 and eps = 1e-5. A perfect prediction gives a value slightly below 0,
    an image without a labelled pixel a value near -1.
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
    """Return the Tversky loss: the class-weighted mean over classes, then the mean over images.

    A class of an image has 1 - (TP + s) / (TP + alpha FP + beta FN + s) over labelled pixels, with
    TP = sum p g, FP = sum p (1 - g), FN = sum (1 - p) g and s = 1. Classes stay apart, because over
    all of them together FP equals FN. Source: Salehi et al. 2017.
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


# The keys are those of `grammar.KINDS`.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "CE": cross_entropy,
    "CEMP": pooled_cross_entropy,
    "DL": dice,
    "FL": focal,
    "FLMP": pooled_focal,
    "TL": tversky,
}


def combined_loss(
    logits: Tensor,
    target: Tensor,
    loss: LossSpec,
    position: float,
    weights: Tensor,
    void: int,
    global_sum: GlobalSum = alone,
) -> Tensor:
    """Return this rank's part of a loss, a scalar; the parts of all ranks add up to the loss.

    Args:
        logits: float [B, C, H, W] of any precision; half precision is computed in float32.
        target: int64 [B, H, W], classes 0 to C - 1, or `void` where a pixel is ignored.
        loss: terms and schedule.
        position: fraction of training done, in [0, 1).
        weights: class weights [C], for the terms that are weighted.
        void: label of ignored pixels (torch's `ignore_index`).
        global_sum: adds a tensor over all ranks.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # the softmax would turn an infinite logit of a void pixel into a gradient of nan
    labelled = target != void
    logits = logits.masked_fill(~labelled.unsqueeze(1), 0.0)
    log_probs = torch.log_softmax(logits, dim=1)
    value = log_probs.new_zeros(())
    for term, share in zip(loss.terms, term_weights(loss.schedule, position), strict=True):
        if share != 0:  # skip the cost of a term that does not count now
            term_loss, term_class_weights = LOSSES[term.kind], weights if term.weighted else None
            part = term_loss(
                log_probs, target, labelled, term_class_weights, global_sum, *term.parameters
            )
            value = value + share * part
    return value


def _true_class(
    log_probs: Tensor, target: Tensor, labelled: Tensor, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return log p of the true class and its weight, both [B, H, W] and 0 for void pixels."""
    index = torch.where(labelled, target, 0)
    of_class = OfClass.apply if by_comparison(log_probs.device) else _of_class
    log_p = of_class(log_probs, index)
    # where, not a product: a void pixel may hold an infinite value
    log_p = torch.where(labelled, log_p, 0.0)
    weight = labelled.to(log_probs.dtype)
    if class_weights is not None:
        weight = weight * class_weights.to(log_probs)[index]
    return log_p, weight


def by_comparison(device: torch.device) -> bool:
    """Return whether the gradient of log p of the true class is `OfClass`'s."""
    return device.type != "cpu"


class OfClass(torch.autograd.Function):
    """`_of_class` with a gradient that compares each class with `index`.

    Under deterministic algorithms torch's own gradient sorts an index for every pixel on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, index: Tensor) -> Tensor:
        ctx.num_classes = log_probs.shape[1]
        ctx.save_for_backward(index)
        return _of_class(log_probs, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (index,) = gradients, ctx.saved_tensors
        classes = torch.arange(ctx.num_classes, device=index.device)[:, None, None]
        return torch.where(index.unsqueeze(1) == classes, gradient.unsqueeze(1), 0.0), None


def _of_class(log_probs: Tensor, index: Tensor) -> Tensor:
    return log_probs.gather(1, index.unsqueeze(1)).squeeze(1)


def _weighted_mean(values: Tensor, weight: Tensor, global_sum: GlobalSum) -> Tensor:
    total = global_sum(weight.sum())
    return (weight * values).sum() / torch.where(total > 0, total, 1.0)


def _focal_of_pixels(log_p: Tensor, gamma: float) -> Tensor:
    missed = -torch.expm1(log_p)
    if gamma < 1:  # the power has an infinite slope at 0, the value of void pixels
        missed = missed.clamp(min=torch.finfo(missed.dtype).tiny)
    return missed**gamma * -log_p


def _mean_over_images(per_image: Tensor, global_sum: GlobalSum) -> Tensor:
    images = global_sum(per_image.new_full((), len(per_image)))
    return per_image.sum() / images


def _pooled_mean(
    values: Tensor, weight: Tensor, labelled: Tensor, global_sum: GlobalSum, p: float, share: float
) -> Tensor:
    # class weights multiply the losses before pooling; with a share of 1 this is the weighted mean
    weight = weight[labelled].double()
    number, total = global_sum(torch.stack([weight.new_full((), len(weight)), weight.sum()]))
    weight = weight * (number / torch.where(total > 0, total, 1.0))
    pooling = pooling_weights(values.detach()[labelled].double() * weight, global_sum, p, share)
    # a product with all values keeps less for the backward pass than indexing the labelled ones
    shares = torch.zeros_like(values)
    shares[labelled] = (pooling * weight).to(values)
    return (shares * values).sum()


def sum_of_powers(log_probs: Tensor, where: Tensor, power: int) -> Tensor:
    """Return the sum of p^power over the pixels at `where`, for each image and class, [B, C].

    For the backward pass it keeps `where`, a mask, and `log_probs`, which log-softmax keeps anyway.
    Values elsewhere, infinite ones too, reach neither the value nor the gradient.

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
