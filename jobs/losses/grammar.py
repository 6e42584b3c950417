"""The grammar of the paper's loss names, the table of terms, and the schedules of their weights.

Free of torch, because planning imports it.

    name   = term | term term | term ("N" | "A") term ["@" s "-" e]
    term   = ["W"] ("CE" | "DL" | "FL" ["[" gamma "]"] | "TL" ["[" alpha "," beta "]"]
                    | "CEMP" ["[" p "," share "]"] | "FLMP" ["[" gamma "," p "," share "]"])

`W` means class-weighted and `MP` max-pooled. Two terms side by side count half each. `N` (naive)
moves from the first term to the second between s and e. `A` (alternating) moves from the second to
the first until s, and back until e. Here s and e are fractions of all steps. `PARAMETERS` has the
defaults and ranges of the numbers in brackets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

KINDS = {
    "CEMP": "max-pooled cross entropy",
    "CE": "cross entropy",
    "DL": "dice loss",
    "FLMP": "max-pooled focal loss",
    "FL": "focal loss",
    "TL": "Tversky loss",
}
NAIVE_RAMP = (0.3, 0.9)  # the paper's s and e
ALTERNATING_RAMP = (0.5, 0.9)
Ramp = Literal["constant", "linear", "cosine"]


class UnknownLoss(ValueError):
    """A name that the grammar does not have; `reason` says why, if it is close to a valid one."""

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(name)
        self.reason = reason


@dataclass(frozen=True)
class Parameter:
    """An adjustable number of a loss function, and its closed range [low, high]."""

    name: str
    default: float
    low: float
    high: float


_FOCUS = Parameter("gamma", 2.0, 0.0, 100.0)  # the exponent of a focal loss
# See `pooling_weights`. For a p closer to 1 the powers l^(p / (p - 1)) overflow float64.
_POOLING = (Parameter("p", 1.3, 1.05, 100.0), Parameter("share", 0.1, 1e-6, 1.0))
# Weights of false positives and of false negatives: a missed pixel costs more than a false alarm.
_TVERSKY = (Parameter("alpha", 0.3, 0.0, 1e6), Parameter("beta", 0.7, 0.0, 1e6))

# The numbers in brackets behind a kind, in this order.
PARAMETERS: Mapping[str, tuple[Parameter, ...]] = {
    "CEMP": _POOLING,
    "FL": (_FOCUS,),
    "FLMP": (_FOCUS, *_POOLING),
    "TL": _TVERSKY,
}


def defaults(kind: str) -> tuple[float, ...]:
    """Return the default parameters of a kind of loss."""
    return tuple(parameter.default for parameter in PARAMETERS.get(kind, ()))


@dataclass(frozen=True)
class Term:
    """One loss function: a key of `KINDS`, class weighting, and its `PARAMETERS` unless default."""

    kind: str
    weighted: bool
    parameters: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        parameters = f"[{','.join(f'{p:g}' for p in self.parameters)}]" if self.parameters else ""
        return ("W" if self.weighted else "") + self.kind + parameters


@dataclass(frozen=True)
class Knot:
    """The weights of all terms at the fraction `at` of training, and the ramp that leads to them.

    From the weights a of the knot before to the weights b of this one, with t from 0 to 1:
    `linear` is a + (b - a) t, `cosine` is a + (b - a)(1 - cos(pi t / 2)), and `constant` is a jump
    at `at`.
    """

    at: float
    weights: tuple[float, ...]
    ramp: Ramp = "linear"


@dataclass(frozen=True)
class LossSpec:
    """A loss of a grid: its terms, and a piecewise schedule of their weights."""

    name: str
    terms: tuple[Term, ...]
    schedule: tuple[Knot, ...]

    @cached_property
    def identity_json(self) -> str:
        """Return the loss as canonical JSON. It is cached: thousands of cells share a loss."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_TERM = rf"(W?)({'|'.join(KINDS)})(?:\[({_NUMBER}(?:,{_NUMBER})*)\])?"
_NAME = re.compile(rf"{_TERM}(?:([NA]?){_TERM}(?:@({_NUMBER})-({_NUMBER}))?)?")


def parse_loss(
    name: str,
    naive: tuple[float, float] = NAIVE_RAMP,
    alternating: tuple[float, float] = ALTERNATING_RAMP,
) -> LossSpec:
    """Return the loss of a name.

    Args:
        name: a name of the grammar, such as `DLNWCE@0.2-0.8`.
        naive: (s, e) of the naive schedule as fractions of all steps, unless the name has its own.
        alternating: the same of the alternating schedule.

    Raises:
        UnknownLoss: the grammar does not have the name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UnknownLoss(name)
    first = _term(name, *match.group(1, 2, 3))
    if match[6] is None:
        return LossSpec(name, (first,), (Knot(0.0, (1.0,)),))
    second = _term(name, *match.group(5, 6, 7))
    own = (float(match[8]), float(match[9])) if match[8] else None
    return LossSpec(name, (first, second), _schedule(name, match[4], own, naive, alternating))


def naive_schedule(start: float, end: float) -> tuple[Knot, ...]:
    """Return the paper's naive ramp from s = `start` to e = `end`.

    w_2 = clip((x - s) / (e - s), 0, 1) and w_1 = 1 - w_2, where x is the fraction of steps done.
    """
    return (Knot(0.0, (1.0, 0.0)), Knot(start, (1.0, 0.0)), Knot(end, (0.0, 1.0)))


def alternating_schedule(start: float, end: float) -> tuple[Knot, ...]:
    """Return the paper's alternating ramp from s = `start` to e = `end`.

    w_2 = clip(1 - x/s, 0, 1) + 1 - cos(pi/2 clip((x - s) / (e - s), 0, 1)) and w_1 = 1 - w_2, where
    x is the fraction of steps done.
    """
    return (Knot(0.0, (0.0, 1.0)), Knot(start, (1.0, 0.0)), Knot(end, (0.0, 1.0), "cosine"))


def term_weights(schedule: Sequence[Knot], position: float) -> tuple[float, ...]:
    """Return the weights of all terms at a step.

    Args:
        schedule: at least one knot. Before the first and after the last one, its weights hold.
        position: fraction i / I of all optimiser steps that are done; 0 at the first step.
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


def with_ramp(name: str, start: float, end: float) -> str:
    """Return the name of a scheduled loss with the ramp `start` to `end`; other names unchanged.

    Raises `UnknownLoss`.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UnknownLoss(name)
    return f"{name}@{start:g}-{end:g}" if match[4] and not match[8] else name


def example_names() -> list[str]:
    """Return names to suggest: all single terms, and pairs of the other losses with CE or WCE.

    Pairs of WCEMP and WFLMP are left out.
    """
    singles = [w + kind for kind in KINDS for w in ("", "W")]
    pairs = [
        first + how + second
        for first in ("DL", "WDL", "FL", "WFL", "TL", "WTL", "CEMP", "FLMP")
        for how in ("", "N", "A")
        for second in ("CE", "WCE")
    ]
    return singles + pairs


def _term(name: str, weighted: str, kind: str, numbers: str | None) -> Term:
    if numbers is None:
        return Term(kind, bool(weighted))
    allowed, given = PARAMETERS.get(kind, ()), tuple(map(float, numbers.split(",")))
    if not allowed:
        raise UnknownLoss(name, f"{kind} has no parameters")
    if len(given) != len(allowed):
        form = ",".join(parameter.name for parameter in allowed)
        raise UnknownLoss(name, f"write {kind}[{form}]")
    for parameter, value in zip(allowed, given, strict=True):
        if not parameter.low <= value <= parameter.high:
            span = f"{parameter.low:g} to {parameter.high:g}"
            raise UnknownLoss(name, f"{parameter.name} of {kind} must be from {span}")
    if kind == "TL" and not any(given):
        raise UnknownLoss(name, "alpha and beta of TL cannot both be 0")
    # default parameters written out make the same loss
    return Term(kind, bool(weighted), () if given == defaults(kind) else given)


def _schedule(
    name: str,
    how: str,
    own: tuple[float, float] | None,
    naive: tuple[float, float],
    alternating: tuple[float, float],
) -> tuple[Knot, ...]:
    if own is not None and not how:
        raise UnknownLoss(name, "only losses with N or A have a ramp (@s-e)")
    if own is not None and not 0 < own[0] < own[1] <= 1:
        raise UnknownLoss(name, "@s-e needs 0 < s < e <= 1")
    if how == "N":
        return naive_schedule(*(own or naive))
    if how == "A":
        return alternating_schedule(*(own or alternating))
    return (Knot(0.0, (0.5, 0.5)),)


def _ramp(kind: str, t: float) -> float:
    if kind == "linear":
        return t
    if kind == "cosine":
        return 1 - math.cos(math.pi / 2 * t)
    return 0.0  # constant: a jump at the next knot
