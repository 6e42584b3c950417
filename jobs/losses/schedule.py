"""Schedules: the weights of a loss's terms, a pure function of the fraction of training done."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jobs.losses.grammar import Knot


def term_weights(schedule: Sequence[Knot], position: float) -> tuple[float, ...]:
    """The weights of all terms at `position`, the fraction i / I of all optimiser steps done
    before this one (0 at the first step). Before the first knot and after the last one the
    weights stay those of that knot.
    """
    following = next((k for k, knot in enumerate(schedule) if position < knot.at), len(schedule))
    if following == 0:
        return schedule[0].weights
    start = schedule[following - 1]
    if following == len(schedule):
        return start.weights
    end = schedule[following]
    t = _ramp(end.ramp, (position - start.at) / (end.at - start.at))
    return tuple(a + (b - a) * t for a, b in zip(start.weights, end.weights, strict=True))


def _ramp(kind: str, t: float) -> float:
    if kind == "linear":
        return t
    if kind == "cosine":
        return 1 - math.cos(math.pi / 2 * t)
    return 0.0  # constant: the next knot's weights come with a jump at its place
