"""Scores, computed once, from summed counts. The formulas are those of Taubert et al. 2021."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.metrics.counts import FIXED_POINT, NLL_FIXED_POINT, Counts

Reals = NDArray[np.float64]

# The paper's six first, in its order.
SCORES = ("acc", "f1", "rec", "cal", "s_acc", "s_rec", "miou", "ece", "cece", "brier", "nll")
# Of these a smaller one is better.
ERRORS = frozenset({"ece", "cece", "brier", "nll"})


@dataclass(frozen=True)
class Summary:
    """A score over seeds: `defined` of `n` were not nan. `mean` and `std` (of the sample, ddof 1)
    are nan as soon as one value is; `std` is nan too for fewer than two values."""

    mean: float
    std: float
    defined: int
    n: int


def scores(counts: Counts) -> dict[str, float]:
    """Every score of `SCORES`, by name. nan where a score is not defined."""
    acc, rec, cal = accuracy(counts), recall(counts), calibration(counts)
    return {
        "acc": acc,
        "f1": f1(counts),
        "rec": rec,
        "cal": cal,
        "s_acc": harmonic_with_calibration(cal, acc),
        "s_rec": harmonic_with_calibration(cal, rec),
        "miou": mean_iou(counts),
        "ece": top1_error(counts),
        "cece": classwise_error(counts),
        "brier": brier(counts),
        "nll": nll(counts),
    }


def accuracy(counts: Counts) -> float:
    """Fraction of labelled pixels that are right; in [0, 1], nan without pixels."""
    return _ratio(np.trace(counts.confusion), counts.pixels)


def class_recall(counts: Counts) -> Reals:
    """Recall of every class, [C]; nan for a class that no pixel is labelled with."""
    return _ratios(np.diag(counts.confusion), counts.confusion.sum(axis=1))


def recall(counts: Counts) -> float:
    """Class-averaged recall, over the classes present in the labels."""
    return _mean(class_recall(counts)[present(counts)])


def class_f1(counts: Counts) -> Reals:
    """F1 = 2 TP / (labelled + predicted) of every class, [C]; nan for a class that is absent, never
    predicted or never right: its precision or its harmonic mean is 0/0."""
    right = np.diag(counts.confusion)
    f1s = _ratios(2 * right, counts.confusion.sum(axis=0) + counts.confusion.sum(axis=1))
    return np.where(right > 0, f1s, np.nan)


def f1(counts: Counts) -> float:
    """Class-averaged F1 over the classes present in the labels; nan if one of them is never
    predicted or never right."""
    return _mean(class_f1(counts)[present(counts)])


def mean_iou(counts: Counts) -> float:
    """Mean over the present classes of TP / (labelled + predicted - TP)."""
    right = np.diag(counts.confusion)
    union = counts.confusion.sum(axis=0) + counts.confusion.sum(axis=1) - right
    return _mean(_ratios(right, union)[present(counts)])


def calibration(counts: Counts) -> float:
    """cal = 1 - (4/N) Σ_i |positives_i / count_i - mean score_i| over N bins, where every pixel and
    every class give one score. At most 1; an empty bin adds 0 and N stays; nan without pixels."""
    if counts.pixels == 0:
        return math.nan
    gaps = _gaps(counts.class_bins.sum(axis=0))
    return float(1 - 4 / counts.bins * np.nansum(gaps))


def harmonic_with_calibration(cal: float, score: float) -> float:
    """S_acc or S_rec: the harmonic mean of `cal` and a `score` in [0, 1]; nan for cal <= 0."""
    if not cal > 0 or math.isnan(score):
        return math.nan
    return 2 * cal * score / (cal + score)


def top1_error(counts: Counts) -> float:
    """Expected calibration error of the highest score: Σ_i count_i / n |accuracy_i - confidence_i|;
    in [0, 1]."""
    return _weighted_gap(counts.top1_bins)


def classwise_error(counts: Counts) -> float:
    """Class-wise expected calibration error: the mean over all C classes of
    Σ_i count_i / n |positives_i / count_i - mean score_i|; in [0, 1]."""
    return _mean(np.array([_weighted_gap(bins) for bins in counts.class_bins]))


def brier(counts: Counts) -> float:
    """Mean over pixels of Σ_c (p_c - y_c)²; in [0, 2]."""
    return _ratio(counts.brier, counts.pixels) / FIXED_POINT


def nll(counts: Counts) -> float:
    """Mean over pixels of -log p of the true class, in nats."""
    return _ratio(counts.nll, counts.pixels) / NLL_FIXED_POINT


def present(counts: Counts) -> NDArray[np.bool_]:
    """Which classes label at least one pixel, [C]."""
    return counts.confusion.sum(axis=1) > 0


def never_right(counts: Counts) -> NDArray[np.bool_]:
    """Return which of the present classes are predicted right for no pixel at all, bool [C]: those
    that leave `f1` undefined."""
    return present(counts) & (np.diag(counts.confusion) == 0)


def reliability(bins: NDArray[np.int64]) -> tuple[Reals, Reals]:
    """(mean score, frequency of being right) of every bin, [N] each; nan in an empty bin. `bins` is
    [N, (count, hits, fixed-point sum of scores)], as in `Counts`."""
    count, hits, total = bins.T
    return _ratios(total, count) / FIXED_POINT, _ratios(hits, count)


def summarise(values: Sequence[float]) -> Summary:
    """A score over seeds; see `Summary`."""
    array = np.array(values, dtype=np.float64)
    mean = float(array.mean()) if len(array) else math.nan
    std = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    return Summary(mean, std, int(np.count_nonzero(~np.isnan(array))), len(array))


def _gaps(bins: NDArray[np.int64]) -> Reals:
    score, frequency = reliability(bins)
    return np.abs(frequency - score)


def _weighted_gap(bins: NDArray[np.int64]) -> float:
    count = bins[:, 0]
    if not count.any():
        return math.nan
    return float(np.nansum(_gaps(bins) * count) / count.sum())


def _ratios(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> Reals:
    result = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result


def _ratio(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> float:
    return int(numerator) / int(denominator) if denominator else math.nan


def _mean(values: Reals) -> float:
    return float(values.mean()) if values.size else math.nan
