"""A loss of the grid as one function of logits: its terms, weighted by its schedule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jobs.losses.functional import LOSSES, GlobalSum, alone
from jobs.losses.grammar import LossSpec, term_weights


def class_weights(class_pixels: Sequence[int]) -> np.ndarray:
    """Inverse class frequencies, scaled so that they sum to the number of classes; float64 [C].
    A class without a pixel gets weight 0.
    """
    pixels = np.asarray(class_pixels, dtype=np.float64)
    inverse = np.divide(1.0, pixels, out=np.zeros_like(pixels), where=pixels > 0)
    total = inverse.sum()
    return inverse * (len(pixels) / total) if total > 0 else inverse


def combined_loss(
    logits: Tensor,
    target: Tensor,
    loss: LossSpec,
    position: float,
    weights: Tensor,
    void: int,
    global_sum: GlobalSum = alone,
) -> Tensor:
    """This rank's part of `loss` at the fraction `position` of training.

    logits: float [B, C, H, W] of any precision; half precision is computed in float32.
    target: int64 [B, H, W], `void` where a pixel counts nowhere.
    weights: the class weights, [C], used by the terms that are weighted.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # an infinite logit of a void pixel would give the softmax a gradient of nan there
    labelled = target != void
    logits = logits.masked_fill(~labelled.unsqueeze(1), 0.0)
    log_probs = torch.log_softmax(logits, dim=1)
    value = log_probs.new_zeros(())
    for term, share in zip(loss.terms, term_weights(loss.schedule, position), strict=True):
        if share != 0:  # a term that counts nothing costs nothing
            of_term = weights if term.weighted else None
            of_loss = LOSSES[term.kind]
            part = of_loss(log_probs, target, labelled, of_term, global_sum, *term.parameters)
            value = value + share * part
    return value
