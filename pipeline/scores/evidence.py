"""The scores of each loss by seed, from counts or from the paper's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jobs.losses.grammar import LossSpec
from pipeline.scores.results_file import DatasetResults, Results
from pipeline.scores.score_table import Row

Key = tuple[str, str, str]  # data set, model, loss
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Kind:
    """The content of a loss, independent of its name.

    `start` and `end` are the terms with a weight above 0 when training starts and ends. `scheduled`
    is True if the weights change in between. `schedule` holds the knots, to tell two ramps apart.
    """

    terms: tuple[str, ...]
    start: frozenset[str]
    end: frozenset[str]
    scheduled: bool
    schedule: tuple[tuple[float, tuple[float, ...], str], ...]

    @property
    def ratio(self) -> tuple[float, ...]:
        """Return the shares of the terms when training starts; their sum is 1."""
        weights = self.schedule[0][1]
        return tuple(round(weight / sum(weights), 9) for weight in weights)

    @property
    def family(self) -> tuple[tuple[str, ...], frozenset[str], frozenset[str], bool]:
        """Return a key that ignores the ends of the ramps and the ratio of the terms."""
        return self.terms, self.start, self.end, self.scheduled


@dataclass(frozen=True)
class Evidence:
    """The scores of a grid or of the paper.

    `scores` are by (data set, model, loss), then by seed. `never_right` names the present classes
    that leave F1 undefined with at least one seed. `kinds` are by the loss's name.
    `most_imbalanced` is the data set with the largest `imbalance`, "" without data.
    """

    scores: Mapping[Key, Mapping[int, Scores]]
    never_right: Mapping[Key, tuple[str, ...]]
    kinds: Mapping[str, Kind]
    most_imbalanced: str

    @cached_property
    def blocks(self) -> dict[tuple[str, str], list[str]]:
        """Return the losses of every (data set, model), in grid order."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for dataset, model, loss in self.scores:
            grouped.setdefault((dataset, model), []).append(loss)
        return grouped

    def by_seed(self, key: Key, score: str) -> dict[int, float]:
        """Return one score of a loss by seed."""
        return {seed: of[score] for seed, of in self.scores[key].items()}


def evidence(results: Results, table: Iterable[Row]) -> Evidence:
    """Return the evidence of a grid's results; `table` holds all their rows."""
    rows = {(row.dataset, row.model, row.loss): row for row in table}
    return Evidence(
        scores={key: dict(zip(row.seeds, row.by_seed, strict=True)) for key, row in rows.items()},
        never_right={key: tuple(row.never_right) for key, row in rows.items()},
        kinds={loss["name"]: kind_of_record(loss) for loss in results.record.get("losses", [])},
        most_imbalanced=max(results.datasets, key=imbalance).name if results.datasets else "",
    )


def kind_of_record(loss: Mapping[str, Any]) -> Kind:
    """Return the kind of a recorded loss {name, terms, schedule: [{at, weights, ramp}]}."""
    knots = [(k["at"], tuple(k["weights"]), k["ramp"]) for k in loss["schedule"]]
    return _kind(loss["terms"], knots)


def kind_of_spec(loss: LossSpec) -> Kind:
    """Return the kind of a loss that the grammar resolved."""
    knots = [(knot.at, knot.weights, str(knot.ramp)) for knot in loss.schedule]
    return _kind([term.name for term in loss.terms], knots)


def imbalance(dataset: DatasetResults) -> float:
    """Return the training pixels of the most frequent class divided by those of the rarest.

    Only classes with pixels in both training and validation count. The result is 0 without any.
    """
    both = (dataset.train_class_pixels > 0) & (dataset.val_class_pixels > 0)
    pixels = dataset.train_class_pixels[both]
    return float(pixels.max() / pixels.min()) if len(pixels) else 0.0


def _kind(terms: Sequence[str], knots: Sequence[tuple[float, tuple[float, ...], str]]) -> Kind:
    return Kind(
        terms=tuple(terms),
        start=_counting(terms, knots[0][1]),
        end=_counting(terms, knots[-1][1]),
        scheduled=any(weights != knots[0][1] for _, weights, _ in knots),
        schedule=tuple(knots),
    )


def _counting(terms: Sequence[str], weights: Sequence[float]) -> frozenset[str]:
    return frozenset(term for term, weight in zip(terms, weights, strict=True) if weight > 0)
