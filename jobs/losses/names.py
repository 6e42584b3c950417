"""The paper's loss names as a grammar, and the table of terms. Free of torch: planning reads it.

    name   = term | term term | term "N" term | term "A" term
    term   = ["W"] ("CE" | "DL" | "FL")

`W` is class-weighted; two terms side by side are a 1:1 sum, half of each; `N` (naive) and `A`
(alternating) are schedules from the first term to the second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

KINDS = {"CE": "cross entropy", "DL": "dice loss", "FL": "focal loss"}
Ramp = Literal["constant", "linear", "cosine"]


class UnknownLoss(ValueError):
    """A name that the grammar does not produce."""


@dataclass(frozen=True)
class Term:
    """One loss function: its kind (a key of `KINDS`) and whether classes are weighted."""

    kind: str
    weighted: bool

    @property
    def name(self) -> str:
        return ("W" if self.weighted else "") + self.kind


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


_TERM = rf"(W?)({'|'.join(KINDS)})"
_NAME = re.compile(rf"{_TERM}(?:([NA]?){_TERM})?")


def parse_loss(
    name: str,
    naive: tuple[float, float] = (0.3, 0.9),
    alternating: tuple[float, float] = (0.5, 0.9),
) -> LossSpec:
    """The loss that a paper's name stands for. `naive` and `alternating` are the (s, e) of the
    two schedules as fractions of all iterations. Raises `UnknownLoss`.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UnknownLoss(name)
    first = Term(match[2], bool(match[1]))
    if match[5] is None:
        return LossSpec(name, (first,), (Knot(0.0, (1.0,)),))
    second = Term(match[5], bool(match[4]))
    schedule = {
        "": (Knot(0.0, (0.5, 0.5)),),
        "N": naive_schedule(*naive),
        "A": alternating_schedule(*alternating),
    }[match[3]]
    return LossSpec(name, (first, second), schedule)


def naive_schedule(start: float, end: float) -> tuple[Knot, ...]:
    """w_2 = clip((i - s) / (e - s), 0, 1), w_1 = 1 - w_2 (the paper's naive ramp)."""
    return (Knot(0.0, (1.0, 0.0)), Knot(start, (1.0, 0.0)), Knot(end, (0.0, 1.0)))


def alternating_schedule(start: float, end: float) -> tuple[Knot, ...]:
    """w_2 = clip(1 - i/s, 0, 1) + 1 - cos(pi/2 clip((i - s) / (e - s), 0, 1)), w_1 = 1 - w_2."""
    return (Knot(0.0, (0.0, 1.0)), Knot(start, (1.0, 0.0)), Knot(end, (0.0, 1.0), "cosine"))


def example_names() -> list[str]:
    """Names to suggest: all single terms, and all pairs of a dice or focal loss with a CE."""
    singles = [w + kind for kind in KINDS for w in ("", "W")]
    pairs = [
        first + how + second
        for first in ("DL", "WDL", "FL", "WFL")
        for how in ("", "N", "A")
        for second in ("CE", "WCE")
    ]
    return singles + pairs
