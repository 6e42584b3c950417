"""Compare losses in pairs on the seeds that both have.

Cells of equal seed share the order of images, the augmentation and the initial head. Paired
differences therefore vary less than the difference of two means.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from data_prep.weights import PRE_FINE
from pipeline.scores.evidence import Evidence

COMPARED = ("s_rec", "rec", "cal", "acc")
REFERENCE = "CE"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Paired:
    """Statistics of the differences of n pairs.

    `mean` is nan without a pair, the sample standard deviation `std` is nan below two pairs.
    `positive` and `negative` are the numbers of differences above and below 0.
    """

    mean: float
    std: float
    positive: int
    negative: int
    n: int

    @property
    def sign_p(self) -> float:
        """Return the two-sided p of the exact sign test, in which differences of 0 do not count.

        It is the probability of signs at least as one-sided under fair coins; 1 without a sign.
        """
        signs = self.positive + self.negative
        tail = sum(math.comb(signs, k) for k in range(min(self.positive, self.negative) + 1))
        return min(1.0, 2 * tail / 2**signs)

    @property
    def smallest_p(self) -> float:
        """Return the smallest p that n pairs can reach: 0.125 for 4, 0.031 for 6."""
        return min(1.0, 2 / 2**self.n)


@dataclass(frozen=True)
class Comparison:
    """`loss` minus `against` in one score, over the seeds of a data set and model.

    If `dataset` and `model` are empty, it is over the means of all data sets and models.
    """

    dataset: str
    model: str
    loss: str
    against: str
    score: str
    paired: Paired


@dataclass(frozen=True)
class Group:
    """All losses of a data set and model minus one of them: a line a loss, a `Paired` a score."""

    dataset: str
    model: str
    against: str
    chosen: bool  # True if `against` is the best on these results, which biases the comparison
    lines: dict[str, list[Paired]]


def summary(differences: Iterable[float]) -> Paired:
    """Return the statistics of the defined differences; nan is undefined."""
    values = np.array([value for value in differences if not math.isnan(value)])
    mean = float(values.mean()) if len(values) else math.nan
    std = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    positive, negative = (int(np.count_nonzero(s * values > 0)) for s in (1, -1))
    return Paired(mean, std, positive, negative, len(values))


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Paired:
    """Return the statistics of `one` minus `other` on the seeds that both have and define."""
    return summary(one[seed] - other[seed] for seed in one if seed in other)


def comparisons(evidence: Evidence) -> list[Comparison]:
    """Return every pair of losses on every data set and model, then every pair over all of them."""
    found = [
        Comparison(dataset, model, loss, against, score, _pair(evidence, dataset, model, loss,
                                                               against, score))
        for (dataset, model), losses in evidence.blocks.items()
        for against, loss in combinations(losses, 2)
        for score in COMPARED
    ]  # fmt: skip
    means: dict[tuple[str, str, str], list[float]] = {}
    for one in found:
        means.setdefault((one.loss, one.against, one.score), []).append(one.paired.mean)
    return found + [
        Comparison("", "", *names, summary(each)) for names, each in means.items() if len(each) > 1
    ]


def groups(evidence: Evidence) -> list[Group]:
    """Return, for every data set and model, its losses minus CE, or minus the best in S_rec.

    The second applies to data sets and models without CE. Groups without a line are left out.
    """
    made = []
    for (dataset, model), losses in evidence.blocks.items():
        against = REFERENCE if REFERENCE in losses else best_s_rec(evidence, dataset, model)
        if against:
            lines = {
                loss: [_pair(evidence, dataset, model, loss, against, score) for score in COMPARED]
                for loss in losses
                if loss != against
            }
            made.append(Group(dataset, model, against, against != REFERENCE, lines))
    return [group for group in made if group.lines]


def across(found: Sequence[Group]) -> Group | None:
    """Return the statistics of the groups' means over data sets and models.

    The result is None unless there are at least two groups, all against the same loss.
    """
    against = {group.against for group in found}
    if len(found) < 2 or len(against) > 1:
        return None
    lines = {
        loss: [
            summary(group.lines[loss][index].mean for group in found if loss in group.lines)
            for index in range(len(COMPARED))
        ]
        for loss in dict.fromkeys(loss for group in found for loss in group.lines)
    }
    return Group("", "", against.pop(), found[0].chosen, lines)


def best_s_rec(evidence: Evidence, dataset: str, model: str) -> str:
    """Return the loss with the best mean S_rec without pre-fine; "" if no loss defines it."""
    means = {
        loss: float(np.mean(list(evidence.by_seed((dataset, model, loss), "s_rec").values())))
        for loss in evidence.blocks[dataset, model]
        if loss != PRE_FINE
    }
    defined = {loss: mean for loss, mean in means.items() if not math.isnan(mean)}
    return max(defined, key=defined.__getitem__) if defined else ""


def to_csv(found: Iterable[Comparison]) -> str:
    """Return the comparisons as CSV.

    `n` is the number of seeds, or of data sets and models in lines without a data set.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["dataset", "model", "loss", "against", "score", "difference", "std",
                     "positive", "negative", "n", "sign_p", "smallest_p"])  # fmt: skip
    for one in found:
        p = one.paired
        names = [one.dataset, one.model, one.loss, one.against, one.score]
        writer.writerow([*names, repr(p.mean), repr(p.std), p.positive, p.negative, p.n,
                         p.sign_p, p.smallest_p])  # fmt: skip
    return file.getvalue()


def shown(one: Paired) -> str:
    """Return a text such as `+0.021 ± 0.004, 4 of 4`; 4 of 4 differences have the mean's sign.

    A p follows only if this number of pairs can reach one below `SIGNIFICANT`.
    """
    if math.isnan(one.mean):
        return "nan"
    spread = "" if math.isnan(one.std) else f" ± {one.std:.3f}"
    agreeing = one.positive if one.mean > 0 else one.negative
    p = f", p = {one.sign_p:.2g}" if one.smallest_p < SIGNIFICANT else ""
    return f"{one.mean:+z.3f}{spread}, {agreeing} of {one.n}{p}"


def _pair(
    evidence: Evidence, dataset: str, model: str, loss: str, against: str, score: str
) -> Paired:
    one, other = (evidence.by_seed((dataset, model, name), score) for name in (loss, against))
    return paired(one, other)
