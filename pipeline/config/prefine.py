"""Resolve `pre-fine` of the paper: CE from weights trained on COCO with VOC's classes.

Both backbone and head start from these weights. A grid names pre-fine among its losses; its cells
have other weights than the rest and so form bundles of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from data_prep.settings import DatasetSettings
from data_prep.weights import PRE_FINE, without_pre_fine
from hpc.cli import UserError
from jobs.losses.grammar import LossSpec, parse_loss
from jobs.spec.protocol import Protocol


def grid_loss(name: str, naive: tuple[float, float], alternating: tuple[float, float]) -> LossSpec:
    """Return the loss that a name in a grid's `losses` means. Raises `UnknownLoss`."""
    if name == PRE_FINE:
        return replace(parse_loss("CE"), name=PRE_FINE)
    return parse_loss(name, naive, alternating)


def protocol_of(loss: LossSpec, protocol: Protocol) -> Protocol:
    """Return the protocol of `loss`: that of the grid, with other weights for pre-fine."""
    return protocol.model_copy(update={"weights": PRE_FINE}) if loss.name == PRE_FINE else protocol


def absences(
    path: Path,
    losses: Collection[str],
    models: Collection[str],
    datasets: Mapping[str, DatasetSettings],
    protocols: Mapping[str, Protocol],
) -> dict[tuple[str, str], str]:
    """Return the reason for each (data set, model) that cannot have pre-fine.

    Raises `UserError` if none can have it, or if `[protocol]` sets its weights for all losses.
    """
    wanted = [name for name in datasets if PRE_FINE in (protocols[name].weights, *losses)]
    reasons = {
        (name, model): without_pre_fine(datasets[name], model)
        for name, model in product(wanted, models)
    }
    absent = {where: why for where, why in reasons.items() if why}
    for where, why in absent.items():
        if protocols[where[0]].weights == PRE_FINE or len(absent) == len(reasons):
            raise UserError(f"{path}: {'/'.join(where)} cannot start from pre-fine: {why}")
    return absent
