"""Count one image in plain PyTorch. Reals become fixed-point integers before they are summed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jobs.metrics.counts import FIXED_POINT, NLL_FIXED_POINT, Counts, Int64

# Cap in nats, because -log p can be infinite. Up to 2^31 - 1 pixels at the cap fit into int64.
LARGEST_NLL = 2.0**16


@torch.no_grad()
def count_image(logits: Tensor, target: Tensor, bins: int, void: int) -> Counts:
    """Return the counts of one image.

    The bin of a score p is min(int(p * bins), bins - 1), in float32. If classes tie, the lowest
    index is the prediction.

    Args:
        logits: float [C, H, W], converted to float32.
        target: integers [H, W], below C or `void`.
        bins: number of bins, at least 1.
        void: label of ignored pixels.

    Raises:
        ValueError: wrong shapes, a label that is no class, or logits that are not finite.
    """
    _check_shapes(logits, target, bins)
    labelled = (target != void).flatten().nonzero()[:, 0]
    truth = target.flatten()[labelled].long()
    _check_labels(truth, len(logits), void)
    scores = logits.flatten(1).index_select(1, labelled).float()
    p, log_p_true = scores.softmax(0), scores.log_softmax(0).gather(0, truth[None])[0]
    _check_numbers(p)
    prediction = lowest_argmax(scores)
    return Counts(
        confusion=_array(_table(truth, prediction, len(logits), len(logits))),
        class_bins=_array(_class_bins(p, truth, bins)),
        top1_bins=_array(_top1_bins(p.amax(0), prediction == truth, bins)),
        brier=_array(_brier(p, truth)),
        nll=_array(_nll(log_p_true)),
        pixels=np.array(labelled.numel(), np.int64),
        void=np.array(target.numel() - labelled.numel(), np.int64),
        images=np.array(1, np.int64),
    )


def _check_shapes(logits: Tensor, target: Tensor, bins: int) -> None:
    if logits.ndim != 3 or target.shape != logits.shape[1:] or target.is_floating_point():
        raise ValueError(
            f"logits must be [C, H, W] and target integers [H, W], not {list(logits.shape)} "
            f"and {list(target.shape)} of {target.dtype}"
        )
    if bins < 1 or len(logits) < 1:
        raise ValueError(
            f"counts need at least one class and one bin, not {len(logits)} and {bins}"
        )


def _check_labels(truth: Tensor, num_classes: int, void: int) -> None:
    if truth.numel() == 0:
        return
    lowest, highest = (int(label) for label in truth.aminmax())
    if lowest < 0 or highest >= num_classes:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"label {wrong} is neither one of {num_classes} classes nor void ({void})")


def _check_numbers(p: Tensor) -> None:
    # scores lie in [0, 1], so the sum is finite unless one of them is nan
    if not bool(torch.isfinite(p.sum())):
        raise ValueError("logits contain nan or infinity, so they give no scores")


def lowest_argmax(scores: Tensor) -> Tensor:
    """Return the class of the highest score, int64 [...]; the lowest class if scores tie.

    Args:
        scores: [C, ...].
    """
    # torch.argmax does not specify which of equal values it returns, and kernels differ
    highest = scores.amax(0)
    prediction = torch.zeros_like(highest, dtype=torch.int64)
    for label in reversed(range(len(scores))):
        prediction.masked_fill_(scores[label] == highest, label)
    return prediction


def _table(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Return how often each (row, column) occurs, int64 [num_rows, num_columns]."""
    counts = torch.bincount(rows * num_columns + columns, minlength=num_rows * num_columns)
    return counts.reshape(num_rows, num_columns)


def _class_bins(p: Tensor, truth: Tensor, bins: int) -> Tensor:
    # class by class: the temporary memory of one plane stays in the cache
    count_and_sum = torch.stack([_binned(score, bins) for score in p])
    bin_of_truth = _bin(p.gather(0, truth[None])[0], bins)
    positives = _table(truth, bin_of_truth, len(p), bins)
    count, total = count_and_sum.unbind(-1)
    return torch.stack([count, positives, total], dim=-1)


def _top1_bins(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
    count, total = _binned(confidence, bins).unbind(-1)
    right = torch.bincount(_bin(confidence[correct], bins), minlength=bins)
    return torch.stack([count, right, total], dim=-1)


def _bin(score: Tensor, bins: int) -> Tensor:
    return (score * bins).long().clamp_(max=bins - 1)


def _binned(score: Tensor, bins: int) -> Tensor:
    """Return int64 [bins, (count, fixed-point sum of scores)]."""
    index = _bin(score, bins)
    fixed = (score * FIXED_POINT).round().long()  # a power of two scales without rounding
    # `bincount` with float64 weights would be exact below 2^53, but deterministic algorithms refuse
    # it on a GPU
    total = torch.zeros(bins, dtype=torch.int64, device=score.device).scatter_add_(0, index, fixed)
    return torch.stack([torch.bincount(index, minlength=bins), total], dim=-1)


def _brier(p: Tensor, truth: Tensor) -> Tensor:
    # sum_c (p_c - y_c)^2 = sum_c p_c^2 - 2 p_true + 1, in float64 because of the cancellation
    squares = torch.zeros_like(p[0], dtype=torch.float64)
    for score in p:
        squares.addcmul_(score.double(), score.double())
    per_pixel = squares - 2 * p.gather(0, truth[None])[0].double() + 1
    return (per_pixel * FIXED_POINT).round().long().sum()


def _nll(log_p_true: Tensor) -> Tensor:
    surprise = (-log_p_true.double()).clamp(0.0, LARGEST_NLL)
    return (surprise * NLL_FIXED_POINT).round().long().sum()


def _array(tensor: Tensor) -> Int64:
    return tensor.cpu().numpy()
