"""Loss max-pooling (Rota Bulò, Neuhold, Kontschieder, CVPR 2017).

It is the weighted mean over pixels with the weights that make it largest, under a bound on their
norm and on each weight.

Let n be the number of labelled pixels of the global batch, m = share * n, q = p / (p - 1),
gamma = n^(-1/q) and tau = gamma m^(-1/p). The weights maximise sum w_u l_u under w >= 0,
||w||_p <= gamma and max w <= tau.

The losses above a threshold t, the set J(t) = {u: l_u > t}, get the weight tau. The others get
tau (l_u / alpha)^(q - 1), with alpha^q = sum_{u not in J} l_u^q / (m - |J|). The threshold is the
largest t with

    t^q (m - |J(t)|) <= sum_{l_u <= t} l_u^q.

This is true at t = 0 and, once false, false for every larger t. Each rank sorts its own losses. All
ranks search t together, by sums over ranks alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from jobs.losses.grammar import defaults

P, SHARE = defaults("CEMP")
_TRIED_AT_ONCE = 4095  # thresholds: six rounds find a float64
_ROW = 256  # values in a row of `sums_by_rows`


def pooling_weights(
    losses: Tensor,
    global_sum: Callable[[Tensor], Tensor],
    p: float = P,
    share: float = SHARE,
) -> Tensor:
    """Return the weights of this rank's `losses`, float64 [n], none below 0.

    Args:
        losses: float64 [n], none below 0; may be empty on a rank.
        global_sum: adds a tensor over all ranks.
        p: exponent of the norm that bounds the weights, at least 1.05.
        share: m / n, in (0, 1]. At least this share of all losses gets weight.

    The sum over all ranks of weights x losses lies between the mean of all losses and the mean of
    the m largest. With a share of 1 it is the mean.
    """
    q = p / (p - 1)
    number, total = global_sum(torch.stack([losses.new_full((), len(losses)), losses.sum()]))
    if total == 0:
        return torch.full_like(losses, 1.0) / number.clamp(min=1)
    scaled = losses * (number / total)  # a mean of 1 keeps their powers from overflowing
    m = share * number
    threshold, capped, powers = _threshold(scaled, m, q, number, global_sum)
    alpha = (powers / (m - capped).clamp(min=torch.finfo(m.dtype).tiny)) ** (1 / q)
    relative = torch.where(scaled > threshold, 1.0, scaled / alpha.clamp(min=threshold))
    tau = number ** (-1 / q) * m ** (-1 / p)
    return tau * torch.nan_to_num(relative).clamp(max=1.0) ** (q - 1)


def _threshold(
    losses: Tensor, m: Tensor, q: float, number: Tensor, global_sum: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the threshold t, |J(t)|, and the sum of l^q over the others."""
    ordered = _sorted(losses)
    sums = torch.cat([ordered.new_zeros(1), prefix_sums(ordered**q)])

    def at(thresholds: Tensor) -> tuple[Tensor, Tensor]:
        below = torch.searchsorted(ordered, thresholds, right=True)
        above = (len(ordered) - below).to(ordered.dtype)
        capped, powers = global_sum(torch.stack([above, sums[below]]))
        return capped, powers

    # non-negative float64 numbers have the order of their bits read as integers
    low, high = 0, int((2 * number).view(torch.int64))  # true at low, false at high
    while high - low > 1:
        step = max(1, (high - low) // (_TRIED_AT_ONCE + 1))
        tried = torch.arange(low + step, high, step, device=losses.device)[:_TRIED_AT_ONCE]
        thresholds = tried.view(torch.float64)
        capped, powers = at(thresholds)
        true = int((thresholds**q * (m - capped) <= powers).sum())
        low, high = low + true * step, min(low + (true + 1) * step, high)
    threshold = torch.full((), low, device=losses.device).view(torch.float64)
    capped, powers = at(threshold[None])
    return threshold, capped[0], powers[0]


def prefix_sums(values: Tensor) -> Tensor:
    """Return the sums of the first 1, 2, ... n of the values, float [n].

    A GPU has no deterministic `cumsum` of floats; `sums_by_rows` replaces it if the user asked for
    determinism.
    """
    if values.is_cpu or not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(0)
    return sums_by_rows(values)


def sums_by_rows(values: Tensor) -> Tensor:
    """Return `prefix_sums` without `cumsum`.

    A matrix product sums within rows of 256 values; the sums of the rows before are added.
    """
    number = len(values)
    if number <= 1:
        return values
    rows = torch.nn.functional.pad(values, (0, -number % _ROW)).view(-1, _ROW)
    within = rows @ rows.new_ones(_ROW, _ROW).triu()
    before = sums_by_rows(within[:-1, -1])
    return (within + torch.nn.functional.pad(before, (1, 0))[:, None]).flatten()[:number]


def _sorted(losses: Tensor) -> Tensor:
    if losses.device.type == "cpu":  # with vector instructions numpy is 10 times as fast as torch
        return torch.from_numpy(np.sort(losses.numpy()))
    return losses.sort().values
