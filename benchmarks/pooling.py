"""Measure the weights of loss max-pooling for a batch of 12 images of 480 x 480.

The published code sorts the losses and then walks through them in Python, pixel by pixel. The loop
here follows Algorithm 1 of Rota Bulo, Neuhold, Kontschieder (CVPR 2017). The published code has two
mistakes in it that change its values but not its time. All functions must return the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measure import Comparison, copy_bandwidth
from jobs.losses.functional import alone
from jobs.losses.pooling import SHARE, P, pooling_weights

PIXELS = 12 * 480 * 480
Q = P / (P - 1)
HARD = 0.02  # share of badly wrong pixels, so that the cap applies as in real training


def measure() -> list[Comparison]:
    """Compare the seconds for the weights of one batch, on two threads."""
    torch.set_num_threads(2)
    losses = _losses()
    expected = _ours(losses)
    ways = (_ours, published_weights, tuned_weights)
    rounds = [[_seconds(way, losses, expected) for way in ways] for _ in range(2)]
    mine, published, tuned = (tuple(seconds) for seconds in zip(*rounds, strict=True))
    what, limit = "weights of loss max-pooling, 12 x 480 x 480", _limit()
    return [
        Comparison(what, "the published loop over pixels", mine, published, 100.0, limit),
        Comparison(what, "the same loop on Python's numbers", mine, tuned, 0.0, limit),
    ]


def _ours(losses: torch.Tensor) -> torch.Tensor:
    return pooling_weights(losses, alone)


def _seconds(
    way: Callable[[torch.Tensor], torch.Tensor], losses: torch.Tensor, expected: torch.Tensor
) -> float:
    """Return the seconds of one call, which must return the `expected` weights."""
    start = time.perf_counter()
    found = way(losses)
    seconds = time.perf_counter() - start
    difference = float((found - expected).norm() / expected.norm())
    assert difference < 1e-6, f"{way.__name__} differs by {difference}"
    return seconds


def _limit() -> str:
    rate, size = copy_bandwidth(), 8 * PIXELS
    seconds = 2 * size / rate
    text = f"{2 * size / 1e6:.0f} MB at {rate / 1e9:.1f} GB/s: {seconds * 1e3:.1f} ms"
    return f"reading the losses and writing the weights, {text}"


def published_weights(losses: torch.Tensor) -> torch.Tensor:
    """Return the weights, float64 [n], by a loop over the elements of a tensor."""
    ordered, order = losses.sort()
    return _weights(losses, order, ordered**Q)


def tuned_weights(losses: torch.Tensor) -> torch.Tensor:
    """Return the same weights by a loop over Python floats, the fastest form of the loop."""
    ordered, order = losses.sort()
    return _weights(losses, order, (ordered**Q).tolist())


def _weights(
    losses: torch.Tensor, order: torch.Tensor, powers: torch.Tensor | list[float]
) -> torch.Tensor:
    """Cap a loss if the level of the smaller losses would lie below it with all others capped."""
    number = len(losses)
    m = SHARE * number
    tau = number ** (-1 / Q) * m ** (-1 / P)
    room, rest, below = m - number, 0.0, 0
    while below < number:
        power = powers[below]
        if (room + 1) * power - (rest + power) > 0:
            break
        room, rest, below = room + 1, rest + power, below + 1
    alpha = float(rest / room) ** (1 / Q)
    weights = torch.full_like(losses, tau)
    others = order[:below]
    weights[others] = tau * (losses[others] / alpha) ** (Q - 1)
    return weights


def _losses() -> torch.Tensor:
    """Return cross entropies like those of a half-trained network: most small, some large."""
    draw = np.random.default_rng(0)
    losses = draw.exponential(0.2, PIXELS)
    losses[draw.random(PIXELS) < HARD] *= 20
    return torch.from_numpy(losses)
