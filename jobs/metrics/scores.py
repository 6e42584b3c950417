"""Compute scores from summed counts, by the formulas of Taubert et al. 2021."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.metrics.counts import FIXED_POINT, NLL_FIXED_POINT, Counts

Reals = NDArray[np.float64]

# The six scores of the paper come first, in its order.
SCORES = ("acc", "f1", "rec", "cal", "s_acc", "s_rec", "miou", "ece", "cece", "brier", "nll")
# Scores of which a smaller value is better.
ERRORS = frozenset({"ece", "cece", "brier", "nll"})


@dataclass(frozen=True)
class Summary:
    """A score over seeds.

    Attributes:
        mean: nan if one of the values is nan.
        std: sample standard deviation (ddof 1); nan if one of the values is nan or n < 2.
        defined: number of values that are not nan.
        n: number of values.
    """

    mean: float
    std: float
    defined: int
    n: int


def scores(counts: Counts) -> dict[str, float]:
    """Return every score of `SCORES` by name; nan if a score is not defined."""
    acc, rec, cal = accuracy(counts), recall(counts), calibration(counts)
    return {
        "acc": acc,
        "f1": f1(counts),
        "rec": rec,
        "cal": cal,
        "s_acc": harmonic_with_calibration(cal, acc),
        "s_rec": harmonic_with_calibration(cal, rec),
        "miou": mean_iou(counts),
        "ece": expected_calibration_error(counts),
        "cece": classwise_calibration_error(counts),
        "brier": brier(counts),
        "nll": nll(counts),
    }


def accuracy(counts: Counts) -> float:
    """Return the fraction of labelled pixels predicted right, in [0, 1]; nan without pixels."""
    return _ratio(np.trace(counts.confusion), counts.pixels)


def class_recall(counts: Counts) -> Reals:
    """Return the recall of every class, [C]; nan for a class without labelled pixels."""
    return _ratios(np.diag(counts.confusion), counts.confusion.sum(axis=1))


def recall(counts: Counts) -> float:
    """Return the mean recall of the classes present in the labels, in [0, 1]."""
    return _mean(class_recall(counts)[present(counts)])


def class_f1(counts: Counts) -> Reals:
    """Return F1 = 2 TP / (labelled + predicted) of every class, [C].

    It is nan for a class that is absent, never predicted or never right, because its recall, its
    precision or their harmonic mean is 0/0.
    """
    right = np.diag(counts.confusion)
    f1s = _ratios(2 * right, counts.confusion.sum(axis=0) + counts.confusion.sum(axis=1))
    return np.where(right > 0, f1s, np.nan)


def f1(counts: Counts) -> float:
    """Return the mean F1 of the classes present in the labels, in [0, 1].

    It is nan if one of them is never predicted or never right.
    """
    return _mean(class_f1(counts)[present(counts)])


def mean_iou(counts: Counts) -> float:
    """Return the mean over present classes of TP / (labelled + predicted - TP), in [0, 1]."""
    right = np.diag(counts.confusion)
    union = counts.confusion.sum(axis=0) + counts.confusion.sum(axis=1) - right
    return _mean(_ratios(right, union)[present(counts)])


def calibration(counts: Counts) -> float:
    """Return cal = 1 - (4/N) Σ_i |positives_i / count_i - mean score_i| over N bins.

    Every pixel gives one score for every class. An empty bin adds 0 and still counts in N. The
    result is at most 1, and nan without pixels.
    """
    if counts.pixels == 0:
        return math.nan
    gaps = _gaps(counts.class_bins.sum(axis=0))
    return float(1 - 4 / counts.bins * np.nansum(gaps))


def harmonic_with_calibration(cal: float, score: float) -> float:
    """Return S_acc or S_rec: the harmonic mean of `cal` and `score` in [0, 1]; nan if cal <= 0."""
    if not cal > 0 or math.isnan(score):
        return math.nan
    return 2 * cal * score / (cal + score)


def expected_calibration_error(counts: Counts) -> float:
    """Return the expected calibration error (ECE) of the highest score, in [0, 1].

    ECE = Σ_i count_i / n |accuracy_i - confidence_i|.
    """
    return _weighted_gap(counts.top1_bins)


def classwise_calibration_error(counts: Counts) -> float:
    """Return the class-wise expected calibration error, in [0, 1].

    It is the mean over all C classes of Σ_i count_i / n |positives_i / count_i - mean score_i|.
    """
    return _mean(np.array([_weighted_gap(bins) for bins in counts.class_bins]))


def brier(counts: Counts) -> float:
    """Return the mean over pixels of Σ_c (p_c - y_c)², in [0, 2]."""
    return _ratio(counts.brier, counts.pixels) / FIXED_POINT


def nll(counts: Counts) -> float:
    """Return the mean over pixels of -log p of the true class, in nats."""
    return _ratio(counts.nll, counts.pixels) / NLL_FIXED_POINT


def present(counts: Counts) -> NDArray[np.bool_]:
    """Return a mask of the classes with labelled pixels, bool [C]."""
    return counts.confusion.sum(axis=1) > 0


def never_right(counts: Counts) -> NDArray[np.bool_]:
    """Return a mask of the present classes that are never predicted right, bool [C].

    They leave `f1` undefined.
    """
    return present(counts) & (np.diag(counts.confusion) == 0)


def reliability(bins: NDArray[np.int64]) -> tuple[Reals, Reals]:
    """Return mean score and frequency of being right of every bin, [N] each; nan in empty bins.

    Args:
        bins: int64 [N, (count, hits, fixed-point sum of scores)], as in `Counts`.
    """
    count, hits, total = bins.T
    return _ratios(total, count) / FIXED_POINT, _ratios(hits, count)


def summarise(values: Sequence[float]) -> Summary:
    """Return mean and standard deviation of a score over seeds."""
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
