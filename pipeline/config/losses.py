"""Resolve the losses of a grid file: the paper's names and [[loss]] tables, without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field

from data_prep.weights import PRE_FINE
from hpc.cli import UserError
from hpc.config import Name, Settings, did_you_mean, parse, shown
from jobs.losses.grammar import (
    Knot,
    LossSpec,
    Ramp,
    UnknownLoss,
    example_names,
    parse_loss,
    with_ramp,
)
from jobs.spec.protocol import Protocol
from pipeline.config.prefine import grid_loss

Weight = Annotated[float, Field(ge=0.0)]


class KnotTable(Settings):
    """One entry of a [[loss]]'s schedule, see `Knot`."""

    at: Annotated[float, Field(ge=0.0, le=1.0)]
    """Position in training. Unit: fraction of all steps."""
    weights: Annotated[tuple[Weight, ...], Field(min_length=1)]
    """Weight of each term at that position."""
    ramp: Ramp = "linear"
    """Interpolation from the previous entry's weights; `constant` keeps them until `at`."""


class LossTable(Settings):
    """A [[loss]]: named terms and a piecewise schedule of their weights; equal shares if none."""

    name: Name
    """Name of the loss in tables and files; no name of the grammar below."""
    terms: Annotated[tuple[str, ...], Field(min_length=1)]
    """Single losses of the grammar below, such as `"WDL"` or `"FL[2]"`."""
    schedule: tuple[dict[str, Any], ...] = ()
    """Weights of the terms during training. Empty: equal weights all the time."""


def with_ramps(
    where: str, names: Sequence[str], ramps: Sequence[tuple[float, float]]
) -> tuple[str, ...]:
    """Replace each scheduled loss without a ramp in its name by one for each of `ramps`.

    `where` names the grid file. Raises `UserError` for a ramp [s, e] that is not 0 < s < e.
    """
    for start, end in ramps:
        if not 0 < start < end:
            raise UserError(f"{where}: ramps: [{start:g}, {end:g}] must be [s, e] with 0 < s < e")
    try:
        every = [with_ramp(n, *r) if n != PRE_FINE else n for n in names for r in ramps or ()]
    except UnknownLoss:
        return tuple(names)  # `resolve_losses` refuses it with a hint
    return tuple(dict.fromkeys(every)) if ramps else tuple(names)


def resolve_losses(
    where: str, names: Sequence[str], tables: Sequence[dict[str, Any]], protocol: Protocol
) -> Iterator[LossSpec]:
    """Yield the losses of `names` under the ramps of `protocol`, then those of the [[loss]] tables.

    `where` names the grid file. Raises `UserError` for an unknown or repeated name, or without any
    loss.
    """
    ramps = (protocol.naive_ramp, protocol.alternating_ramp)
    try:
        yield from (grid_loss(name, *ramps) for name in names)
    except UnknownLoss as error:
        name = str(error)
        hint = error.reason or did_you_mean(name, [*example_names(), PRE_FINE])
        raise UserError(f"{where}: unknown loss {shown(name)}; {hint}") from error
    taken = list(names)
    for table in tables:
        composed = _composed_loss(parse(LossTable, table, f"{where}: [[loss]]"), where, taken)
        taken.append(composed.name)
        yield composed
    if not taken:
        raise UserError(f"{where}: no loss; add losses = [...] or a table [[loss]]")


def _composed_loss(table: LossTable, file: str, taken: Collection[str]) -> LossSpec:
    where = f"{file}: [[loss]] {shown(table.name)}"
    if table.name in (*taken, PRE_FINE):
        raise UserError(f"{where}: another loss has that name already; choose another")
    if _is_of_the_paper(table.name):
        raise UserError(f"{where}: that name means a loss of the paper; choose another")
    terms = []
    for name in table.terms:
        try:
            (term,) = parse_loss(name).terms
        except ValueError as error:  # UnknownLoss, or a name of two terms
            singles = [n for n in example_names() if len(parse_loss(n).terms) == 1]
            hint = getattr(error, "reason", "") or did_you_mean(name, singles)
            raise UserError(f"{where}: unknown term {shown(name)}; {hint}") from error
        terms.append(term)
    equal = {"at": 0.0, "weights": [1 / len(terms)] * len(terms)}
    knots = [parse(KnotTable, k, f"{where}: schedule") for k in table.schedule or (equal,)]
    if any(len(knot.weights) != len(terms) for knot in knots):
        raise UserError(
            f"{where}: schedule needs {len(terms)} weights at each place, as many as terms"
        )
    if any(sum(knot.weights) == 0 for knot in knots):
        raise UserError(f"{where}: the weights of a place are all 0; give one term a share")
    places = [knot.at for knot in knots]
    if any(a >= b for a, b in pairwise(places)):
        raise UserError(f"{where}: the places of the schedule (at) must rise")
    schedule = tuple(Knot(knot.at, knot.weights, knot.ramp) for knot in knots)
    return LossSpec(table.name, tuple(terms), schedule)


def _is_of_the_paper(name: str) -> bool:
    try:
        parse_loss(name)
    except UnknownLoss:
        return False
    return True
