"""The loss functions, on log-probabilities of the whole batch or of one rank's share of it.

Every function takes `log_probs`, float [B, C, H, W], the log-softmax of the logits, and `target`,
int64 [B, H, W] with classes 0 to C - 1 and `VOID` where a pixel counts nowhere. It returns this
rank's part of the loss: sums and normalisers are those of the global batch, so the parts of all
ranks add up to the value that one rank computes on the whole batch, and so do their gradients.
`global_sum` adds a tensor over all ranks; it is the identity where there is one.

A batch without a labelled pixel has a finite value and a zero gradient. Formulas: the paper's
section 2 (Taubert et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

VOID = 255
DICE_SMOOTHING = 1.0
DICE_EPSILON = 1e-5
FOCAL_GAMMA = 2.0

GlobalSum = Callable[[Tensor], Tensor]


def alone(value: Tensor) -> Tensor:
    """The `global_sum` of a single rank."""
    return value


class LossFunction(Protocol):
    """What every loss below looks like. `class_weights` is [C] or None for equal weights."""

    def __call__(
        self, log_probs: Tensor, target: Tensor, class_weights: Tensor | None, global_sum: GlobalSum
    ) -> Tensor: ...


def cross_entropy(
    log_probs: Tensor,
    target: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
) -> Tensor:
    """sum -w_c log p / sum w_c over labelled pixels: torch's `CrossEntropyLoss(weight=...)`."""
    log_p, weight = _true_class(log_probs, target, class_weights)
    return _weighted_mean(-log_p, weight, global_sum)


def focal(
    log_probs: Tensor,
    target: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
) -> Tensor:
    """sum -w_c (1 - p)^gamma log p / sum w_c over labelled pixels, gamma = 2 (Lin et al. 2017,
    without alpha)."""
    log_p, weight = _true_class(log_probs, target, class_weights)
    modulation = (-torch.expm1(log_p)) ** FOCAL_GAMMA
    return _weighted_mean(-modulation * log_p, weight, global_sum)


def dice(
    log_probs: Tensor,
    target: Tensor,
    class_weights: Tensor | None = None,
    global_sum: GlobalSum = alone,
) -> Tensor:
    """1 - 2 (sum_c w_c sum p g + s) / (sum_c w_c sum (g^2 + p^2) + s + eps), per image over its
    labelled pixels, then the mean over the images of the batch. A perfect prediction lands
    slightly below 0, an image without a labelled pixel near -1.
    """
    log_p, weight = _true_class(log_probs, target, class_weights)
    labelled = (target != VOID).unsqueeze(1)
    squares = torch.where(labelled, (2 * log_probs).exp(), 0.0).sum(dim=(2, 3))  # [B, C]
    if class_weights is not None:
        squares = squares * class_weights.to(squares)
    overlap = (weight * log_p.exp()).sum(dim=(1, 2))
    total = weight.sum(dim=(1, 2)) + squares.sum(dim=1)
    per_image = 1 - 2 * (overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING + DICE_EPSILON)
    images = global_sum(per_image.new_tensor(float(len(per_image))))
    return per_image.sum() / images


LOSSES: dict[str, LossFunction] = {"CE": cross_entropy, "DL": dice, "FL": focal}


def _true_class(
    log_probs: Tensor, target: Tensor, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log p of the true class and its weight, both [B, H, W]; both 0 where the pixel is void."""
    labelled = target != VOID
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
