"""The paper's loss names as a grammar, and the table of terms. Free of torch: planning reads it.

    name   = term | term term | term ("N" | "A") term ["@" s "-" e]
    term   = ["W"] ("CE" ["MP"] | "FL" ["MP"] | "DL" | "TL" ["[" alpha "," beta "]"])

`W` is class-weighted and `MP` max-pooled; two terms side by side are a 1:1 sum, half of each; `N`
(naive) and `A` (alternating) are schedules from the first term to the second, between the fractions
s and e of all iterations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

KINDS = {
    "CEMP": "max-pooled cross entropy",
    "CE": "cross entropy",
    "DL": "dice loss",
    "FLMP": "max-pooled focal loss",
    "FL": "focal loss",
    "TL": "Tversky loss",
}
TVERSKY = (0.3, 0.7)  # alpha, beta: a missed pixel costs more than a false alarm
NAIVE_RAMP = (0.3, 0.9)  # the paper's s and e
ALTERNATING_RAMP = (0.5, 0.9)
Ramp = Literal["constant", "linear", "cosine"]


class UnknownLoss(ValueError):
    """A name that the grammar does not produce."""


@dataclass(frozen=True)
class Term:
    """One loss function: its kind (a key of `KINDS`), whether classes are weighted, and what
    parameters it has beside: alpha and beta of a Tversky loss."""

    kind: str
    weighted: bool
    parameters: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        parameters = f"[{','.join(f'{p:g}' for p in self.parameters)}]" if self.parameters else ""
        return ("W" if self.weighted else "") + self.kind + parameters


@dataclass(frozen=True)
class Knot:
    """The weights of all terms at the fraction `at` of training, and how they are reached from
    the knot before: `linear`; `cosine`, which is a + (b - a)(1 - cos(pi t / 2)); or `constant`,
    a jump at `at`."""

    at: float
    weights: tuple[float, ...]
    ramp: Ramp = "linear"


@dataclass(frozen=True)
class LossSpec:
    """A loss of a grid, resolved: terms, and a piecewise schedule of their weights."""

    name: str
    terms: tuple[Term, ...]
    schedule: tuple[Knot, ...]

    def identity(self) -> Mapping[str, Any]:
        """Plain values for a fingerprint."""
        record = asdict(self)
        for term in record["terms"]:
            if not term["parameters"]:  # as before there were any
                del term["parameters"]
        return record

    @cached_property
    def identity_json(self) -> str:
        """`identity` as canonical JSON: thousands of cells have the same loss."""
        return json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))


_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_TERM = rf"(W?)({'|'.join(KINDS)})(?:\[({_NUMBER}),({_NUMBER})\])?"
_NAME = re.compile(rf"{_TERM}(?:([NA]?){_TERM}(?:@({_NUMBER})-({_NUMBER}))?)?")


def parse_loss(
    name: str,
    naive: tuple[float, float] = NAIVE_RAMP,
    alternating: tuple[float, float] = ALTERNATING_RAMP,
) -> LossSpec:
    """The loss that a paper's name stands for. `naive` and `alternating` are the (s, e) of the
    two schedules as fractions of all iterations, where the name does not say. Raises
    `UnknownLoss`.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UnknownLoss(name)
    first = _term(name, *match.group(1, 2, 3, 4))
    if match[7] is None:
        return LossSpec(name, (first,), (Knot(0.0, (1.0,)),))
    second = _term(name, *match.group(6, 7, 8, 9))
    own = (float(match[10]), float(match[11])) if match[10] else None
    return LossSpec(name, (first, second), _schedule(name, match[5], own, naive, alternating))


def naive_schedule(start: float, end: float) -> tuple[Knot, ...]:
    """w_2 = clip((i - s) / (e - s), 0, 1), w_1 = 1 - w_2 (the paper's naive ramp)."""
    return (Knot(0.0, (1.0, 0.0)), Knot(start, (1.0, 0.0)), Knot(end, (0.0, 1.0)))


def alternating_schedule(start: float, end: float) -> tuple[Knot, ...]:
    """w_2 = clip(1 - i/s, 0, 1) + 1 - cos(pi/2 clip((i - s) / (e - s), 0, 1)), w_1 = 1 - w_2."""
    return (Knot(0.0, (0.0, 1.0)), Knot(start, (1.0, 0.0)), Knot(end, (0.0, 1.0), "cosine"))


def with_ramp(name: str, start: float, end: float) -> str:
    """The name of a scheduled loss between other fractions of training; any other name as it is.
    Raises `UnknownLoss`."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UnknownLoss(name)
    return f"{name}@{start:g}-{end:g}" if match[5] and not match[10] else name


def example_names() -> list[str]:
    """Names to suggest: all single terms, and all pairs of another loss with a CE."""
    singles = [w + kind for kind in KINDS for w in ("", "W")]
    pairs = [
        first + how + second
        for first in ("DL", "WDL", "FL", "WFL", "TL", "WTL", "CEMP", "FLMP")
        for how in ("", "N", "A")
        for second in ("CE", "WCE")
    ]
    return singles + pairs


def _term(name: str, weighted: str, kind: str, alpha: str | None, beta: str | None) -> Term:
    if alpha is None or beta is None:
        return Term(kind, bool(weighted))
    parameters = (float(alpha), float(beta))
    if kind != "TL" or not any(parameters):
        raise UnknownLoss(name)
    # written out or not, the same loss is the same
    return Term(kind, bool(weighted), () if parameters == TVERSKY else parameters)


def _schedule(
    name: str,
    how: str,
    own: tuple[float, float] | None,
    naive: tuple[float, float],
    alternating: tuple[float, float],
) -> tuple[Knot, ...]:
    if own is not None and not (how and 0 < own[0] < own[1] <= 1):
        raise UnknownLoss(name)
    if how == "N":
        return naive_schedule(*(own or naive))
    if how == "A":
        return alternating_schedule(*(own or alternating))
    return (Knot(0.0, (0.5, 0.5)),)
