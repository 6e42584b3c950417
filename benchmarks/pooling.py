"""The weights of loss max-pooling for a batch of 12 images of 480 x 480: ours against the published
way, which sorts the losses and then walks up them in Python, pixel by pixel.

The loop is written here from the description of Algorithm 1 of Rota Bulo, Neuhold, Kontschieder
(CVPR 2017) and solves the problem as that paper states it; the published code makes two mistakes
in it that change its value and not its time. All ways must give the same weights.
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
HARD = 0.02  # share of pixels that are badly wrong, so that the cap binds, as in a real training


def measure() -> list[Comparison]:
    """Seconds for the weights of one batch, on two threads."""
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
    """Of one call, which must give the `expected` weights."""
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
    """The weights, float64 [n]: up the sorted losses, one element of a tensor after the other."""
    ordered, order = losses.sort()
    return _weights(losses, order, ordered**Q)


def tuned_weights(losses: torch.Tensor) -> torch.Tensor:
    """The same on a list of Python's floats, which is what a loop is at its best."""
    ordered, order = losses.sort()
    return _weights(losses, order, (ordered**Q).tolist())


def _weights(
    losses: torch.Tensor, order: torch.Tensor, powers: torch.Tensor | list[float]
) -> torch.Tensor:
    """A loss is capped if, with it and all that are larger capped, the level of the others would
    lie below it."""
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
    """Cross entropies of a half-trained network: most pixels are nearly right, some far off."""
    draw = np.random.default_rng(0)
    losses = draw.exponential(0.2, PIXELS)
    losses[draw.random(PIXELS) < HARD] *= 20
    return torch.from_numpy(losses)
