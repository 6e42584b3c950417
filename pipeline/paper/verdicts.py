"""The result of a claim's check, and the criteria that compare losses with each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import product
from statistics import fmean, median, stdev

from data_prep.weights import PRE_FINE
from pipeline.scores.evidence import Evidence, Kind, Scores
from pipeline.scores.paired_comparison import Paired, paired, summary
from pipeline.scores.score_table import LABELS

# Half a unit of the last digit of the paper's table; a smaller difference would not show there.
MARGIN = 0.005

BySeed = Mapping[int, Scores]

PLAIN_TERMS = frozenset({"CE", "DL", "WDL"})


@dataclass(frozen=True)
class Case:
    """A claim on one data set; `holds` is None if the claim cannot be judged there.

    `texts` give the margins, or the missing cells. `sides` are the losses that were compared with
    each other, on each of `models`.
    """

    dataset: str
    models: tuple[str, ...]
    holds: bool | None
    texts: tuple[str, ...]
    sides: tuple[tuple[str, ...], ...]

    @property
    def cells(self) -> list[str]:
        """Return the compared cells without their seeds: `voc/fcn_resnet101/DLNWCE`."""
        losses = dict.fromkeys(loss for side in self.sides for loss in side)
        return [f"{self.dataset}/{model}/{loss}" for model in self.models for loss in losses]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: its sentence, its criterion, and the judged cases."""

    key: str
    sentence: str
    criterion: str
    cases: tuple[Case, ...]

    @property
    def verdict(self) -> str:
        """Return `holds`, `does not hold`, `holds in part`, or `cannot be judged`."""
        said = {case.holds for case in self.cases} - {None}
        if not said:
            return "cannot be judged"
        if len(said) == 2:
            return "holds in part"
        return "holds" if True in said else "does not hold"

    @property
    def extent(self) -> str:
        """Return the number of cases that hold: `4 of 6 cases, 1 cannot be judged`."""
        said = [case.holds for case in self.cases if case.holds is not None]
        unsaid = len(self.cases) - len(said)
        parts = [f"{sum(said)} of {len(said)} case{'s' * (len(said) != 1)}"] if said else []
        return ", ".join(parts + [f"{unsaid} cannot be judged"] * (unsaid > 0))


@dataclass(frozen=True)
class Part:
    """One criterion of a case, which holds, does not hold, or (None) cannot be judged."""

    holds: bool | None
    text: str


@dataclass(frozen=True)
class Block:
    """The losses of one data set and model."""

    evidence: Evidence
    dataset: str
    model: str

    def losses(self, test: Callable[[Kind], bool]) -> list[str]:
        """Return the losses whose kind passes `test`; pre-fine is not a loss of its own."""
        kinds = self.evidence.kinds
        names = self.evidence.blocks[self.dataset, self.model]
        return [n for n in names if n != PRE_FINE and n in kinds and test(kinds[n])]

    def difference(self, one: str, other: str, score: str) -> Paired:
        """Return the score of `one` minus that of `other`, paired by seed."""
        return paired(self.values(one, score), self.values(other, score))

    def values(self, loss: str, score: str) -> dict[int, float]:
        """Return a loss's score by seed."""
        return self.evidence.by_seed((self.dataset, self.model, loss), score)

    def differences(
        self, pairs: Iterable[tuple[str, str]], score: str
    ) -> dict[tuple[str, str], Paired]:
        """Return the differences of the pairs that have a seed which defines both scores."""
        return {names: pair for names in pairs if (pair := self.difference(*names, score)).n}

    def effect(self, score: str) -> float:
        """Return the effect of schedules towards WCE on a score.

        It is the median over these losses minus the median over the static CE and dice losses, nan
        if either group is empty.
        """
        sides = [self.losses(ends_in_wce), self.losses(plain)]
        levels = [[fmean(self.values(loss, score).values()) for loss in side] for side in sides]
        return median(levels[0]) - median(levels[1]) if all(levels) else math.nan

    def judged(
        self, sides: Mapping[str, Sequence[str]], judge: Callable[[], Iterable[Part]]
    ) -> Case:
        """Return the case that `judge` decides, or an open case if a side has no loss.

        `sides` are the compared losses by the description of their side.
        """
        absent = [f"{self.dataset}/{self.model}/{what}" for what, side in sides.items() if not side]
        if absent:
            return self.case(sides, [Part(None, f"missing: {'; '.join(absent)}")])
        return self.case(sides, judge())

    def case(self, sides: Mapping[str, Sequence[str]], parts: Iterable[Part]) -> Case:
        """Return a case that holds if all its parts hold."""
        given = tuple(tuple(dict.fromkeys(side)) for side in sides.values())
        return Case(self.dataset, (self.model,), *joined(parts), given)


def joined(parts: Iterable[Part]) -> tuple[bool | None, tuple[str, ...]]:
    """Return whether all parts hold, and their texts.

    The first value is False if a part does not hold, else None if a part cannot be judged.
    """
    said = list(parts)
    verdicts = {part.holds for part in said}
    holds = False if False in verdicts else None if None in verdicts else True
    return holds, tuple(part.text for part in said)


def blocks(evidence: Evidence) -> list[Block]:
    """Return a block for each data set and model."""
    return [Block(evidence, *names) for names in evidence.blocks]


def ends_in_wce(kind: Kind) -> bool:
    """Return True for a schedule that ends with class-weighted CE alone."""
    return kind.scheduled and kind.end == {"WCE"}


def has_wce(kind: Kind) -> bool:
    """Return True for a compound loss, static or scheduled, that ends with class-weighted CE."""
    return len(kind.terms) > 1 and "WCE" in kind.end


def plain(kind: Kind) -> bool:
    """Return True for a static loss of CE and dice without class-weighted CE."""
    return not kind.scheduled and PLAIN_TERMS.issuperset(kind.terms)


def above(block: Block, highs: Sequence[str], lows: Sequence[str], score: str) -> Part:
    """Judge whether each of `highs` exceeds each of `lows` by more than `MARGIN` in a score.

    The text gives the difference of the closest pair.
    """
    pairs = list(product(highs, lows))
    defined = block.differences(pairs, score)
    if not defined:
        return _of_no_pair(score)
    (high, low), closest = min(defined.items(), key=lambda item: item[1].mean)
    holding = sum(pair.mean > MARGIN for pair in defined.values())
    return Part(
        holding == len(defined),
        f"{LABELS[score]} {amount(closest)} at the closest pair ({high} over {low}), "
        f"{holding} of {len(defined)} pairs{_undefined(pairs, defined)}",
    )


def _of_no_pair(score: str) -> Part:
    return Part(None, f"{LABELS[score]} is defined for no pair")


def _undefined(pairs: Sized, defined: Sized) -> str:
    return f", {len(pairs) - len(defined)} undefined" if len(defined) < len(pairs) else ""


def alike(block: Block, pairs: Sequence[tuple[str, str]], score: str, share: float) -> Part:
    """Judge whether every pair differs by at most `share` of `Block.effect`."""
    limit = share * abs(block.effect(score))
    label = LABELS[score]
    if math.isnan(limit):
        scale = "a schedule towards WCE and a static CE or dice loss"
        return Part(
            None, f"missing: {block.dataset}/{block.model}/{scale}, to give {label} a scale"
        )
    if limit < MARGIN:
        change = block.effect(score)
        return Part(None, f"no scale: schedules towards WCE change {label} by {change:+z.3f} only")
    defined = block.differences(pairs, score)
    if not defined:
        return _of_no_pair(score)
    holding = sum(abs(pair.mean) <= limit for pair in defined.values())
    return Part(
        holding == len(defined),
        f"{label} {furthest(defined)} where {limit:.3f} is allowed, "
        f"{holding} of {len(defined)} pairs{_undefined(pairs, defined)}",
    )


def apart(block: Block, pairs: Sequence[tuple[str, str]], score: str) -> Part:
    """Give the largest difference of the pairs without judging it."""
    defined = block.differences(pairs, score)
    if not defined:
        return Part(True, f"{LABELS[score]} is defined for no pair")
    return Part(True, f"{LABELS[score]} {furthest(defined)}")


def furthest(differences: Mapping[tuple[str, str], Paired]) -> str:
    """Return the largest difference: `+0.110 ± 0.010 (4 of 4 seeds) at the furthest pair (...)`."""
    (one, other), largest = max(differences.items(), key=lambda item: abs(item[1].mean))
    return f"{amount(largest)} at the furthest pair ({one} minus {other})"


def amount(pair: Paired) -> str:
    """Return the mean difference and its spread over seeds: `+0.110 ± 0.010 (4 of 4 seeds)`.

    The count is the number of seeds whose difference has the sign of the mean.
    """
    if pair.n < 2:
        return f"{pair.mean:+z.3f}"
    agreeing = pair.positive if pair.mean > 0 else pair.negative
    return f"{pair.mean:+z.3f} ± {pair.std:.3f} ({agreeing} of {pair.n} seeds)"


def varies_more(block: Block, dice: Sequence[str], others: Sequence[str]) -> Part:
    """Judge whether the loss whose recall varies most over seeds is one of `dice`."""
    values = {loss: list(block.values(loss, "rec").values()) for loss in [*dice, *others]}
    alone = [loss for loss, of in values.items() if len(of) < 2]
    if alone:
        names = "every loss" if len(alone) == len(values) else ", ".join(alone)
        return Part(None, f"missing: a second seed of {names}")
    spread = {loss: stdev(of) for loss, of in values.items()}
    most, next_most = (max(side, key=spread.__getitem__) for side in (dice, others))
    seeds = sorted({len(of) for of in values.values()})
    return Part(
        spread[most] > spread[next_most],
        f"Rec ± {spread[most]:.4f} ({most}) against ± {spread[next_most]:.4f} ({next_most}), "
        f"over {' to '.join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))} seeds",
    )


def ahead(block: Block, pairs: Sequence[tuple[str, str]], score: str) -> list[int]:
    """Return 1 for each pair whose first loss has the higher mean score, and -1 for the second.

    The value is 0 if they differ by at most `MARGIN`. Pairs without a seed that defines both scores
    are left out.
    """
    means = [pair.mean for pair in block.differences(pairs, score).values()]
    return [(mean > MARGIN) - (mean < -MARGIN) for mean in means]


def heads_apart(
    evidence: Evidence,
    dataset: str,
    backbone: str,
    heads: Mapping[str, str],
    signs: Mapping[str, int],
) -> Case:
    """Judge DeepLabV3 against FCN on one backbone.

    `heads` are the models' names by head. `signs` are 1 for each score in which DeepLabV3 should be
    higher, -1 where it should be lower.
    """
    absent = [head for head in ("deeplabv3", "fcn") if head not in heads]
    if absent:
        text = f"missing: {dataset}/{absent[0]}_{backbone}"
        return Case(dataset, tuple(heads.values()), None, (text,), ())
    models = heads["deeplabv3"], heads["fcn"]
    one, other = (
        {loss: evidence.scores[dataset, model, loss] for loss in evidence.blocks[dataset, model]}
        for model in models
    )
    both = [loss for loss in one if set(one[loss]) & set(other.get(loss, ()))]
    if not both:
        text = f"missing: a loss on {dataset} that both models have, of equal seed"
        return Case(dataset, models, None, (text,), ())
    parts = [_in_the_mean(one, other, both, score, sign) for score, sign in signs.items()]
    return Case(dataset, models, *joined(parts), (tuple(both),))


def _in_the_mean(
    one: Mapping[str, BySeed],
    other: Mapping[str, BySeed],
    losses: Sequence[str],
    score: str,
    sign: int,
) -> Part:
    def defined(loss: str) -> bool:
        common = one[loss].keys() & other[loss].keys()
        return not any(math.isnan(of[loss][s][score]) for of in (one, other) for s in common)

    undefined = [loss for loss in losses if not defined(loss)]
    losses = [loss for loss in losses if loss not in undefined]
    if not losses:
        return Part(None, f"{LABELS[score]} is defined for no loss with both models")
    # Average by loss first, so that a missing cell does not shift the mean over losses.
    by_loss = [
        fmean(one[n][seed][score] - other[n][seed][score] for seed in one[n] if seed in other[n])
        for n in losses
    ]
    seeds = set.intersection(*(set(side[n]) for side in (one, other) for n in losses))
    std = summary(
        fmean(one[n][seed][score] - other[n][seed][score] for n in losses) for seed in seeds
    ).std
    spread = "" if math.isnan(std) else f" ± {std:.3f}"
    return Part(
        sign * fmean(by_loss) > MARGIN,
        f"{LABELS[score]} {fmean(by_loss):+z.3f}{spread} in the mean, "
        f"{sum(sign * of > MARGIN for of in by_loss)} of {len(losses)} losses"
        f"{f', {len(undefined)} undefined' if undefined else ''}",
    )


def classes_left_out(block: Block, complete: Sequence[str], others: Sequence[str]) -> Part:
    """Judge whether F1 is defined with every seed for `complete` and for none of `others`."""
    left_out = {
        loss: block.evidence.never_right[block.dataset, block.model, loss]
        for loss in [*complete, *others]
    }
    failing = [f"{loss} ({', '.join(left_out[loss])})" for loss in complete if left_out[loss]]
    surprising = [loss for loss in others if not left_out[loss]]
    return Part(
        not failing and not surprising,
        f"{len(complete) - len(failing)} of {len(complete)} have an F1 with every seed"
        f"{', but not ' + ', '.join(failing) if failing else ''}; "
        f"{len(others) - len(surprising)} of {len(others)} others leave a class out"
        f"{', but not ' + ', '.join(surprising) if surprising else ''}",
    )
