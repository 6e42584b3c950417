"""Scores from integer counts are those of scikit-learn, and of float64 straight from the
probabilities, within what the fixed-point steps allow.

A score p is stored as round(p * 2^24), so off by 2^-25 at most. That holds for a mean of scores,
and for a bin's |accuracy - confidence|, hence for the sum of these over all bins, whose weights add
up to 1, and for the mean of that over classes: top-1 and class-wise ECE are off by 2^-25 at most.
A pixel's Brier score is rounded once, to 2^-24: its mean is off by 2^-25 at most. -log p is rounded
to 2^-16: off by 2^-17 at most, and by what its float32 is off, for which see `nll_bound`. Beside
that float64 itself rounds, which `FLOAT64` covers a thousand times.
"""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from data_prep.settings import VOID
from jobs.metrics.reference import count_image
from jobs.metrics.scores import (
    brier,
    classwise_calibration_error,
    expected_calibration_error,
    nll,
    scores,
)

STEP, NLL_STEP, FLOAT32, FLOAT64 = 2.0**-24, 2.0**-16, 2.0**-24, 1e-12
# few pixels, whose rounding does not average out, and many; classes; bins
SIZES = [(1, 3, 10), (1, 21, 10), (2, 21, 15), (7, 5, 1), (200, 19, 100), (20_000, 5, 10)]
CASES = [(*size, seed) for size in SIZES for seed in range(8 if size[0] < 100 else 1)]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def pixels(request):
    """Logits [C, 1, n + n / 4] and target of which a part is void, and the number of bins. Labels
    follow the scores now and then, so that a score is worth something."""
    n, classes, bins, seed = request.param
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(classes, 1, n + n // 4, generator=generator)
    target = torch.randint(classes, (1, n + n // 4), generator=generator)
    seen = torch.rand(target.shape, generator=generator) < 0.4
    target = torch.where(seen, logits.argmax(0), target)
    target[0, n:] = VOID
    return logits, target, bins


def labelled(logits, target):
    """The float32 scores of the labelled pixels as float64 [n, C], and their labels [n]."""
    keep = target.flatten() != VOID
    p = logits.flatten(1)[:, keep].softmax(0).T.double().numpy()
    return p, target.flatten()[keep].numpy()


def calibration_error(score, hit, bins):
    """Σ_i n_i / n |accuracy_i - confidence_i| from scikit-learn's reliability curve."""
    accuracy, confidence = calibration_curve(hit, score, n_bins=bins, strategy="uniform")
    count = np.histogram(score, np.linspace(0, 1, bins + 1))[0]
    return float((count[count > 0] / len(score) * np.abs(accuracy - confidence)).sum())


def by_a_loop(score, hit, bins):
    """The same from its formula, pixel by pixel."""
    gap = np.zeros(bins)
    for p, is_hit in zip(score, hit, strict=True):
        gap[min(int(p * bins), bins - 1)] += is_hit - p
    return float(np.abs(gap).sum() / len(score))


@pytest.mark.parametrize("error", [calibration_error, by_a_loop])
def test_calibration_errors(pixels, error):
    logits, target, bins = pixels
    counts = count_image(logits, target, bins, VOID)
    p, labels = labelled(logits, target)
    in_float32 = p.astype(np.float32) * np.float32(bins)
    assert (in_float32.astype(int) == (p * bins).astype(int)).all()  # else not the same bins
    top1 = error(p.max(1), p.argmax(1) == labels, bins)
    assert abs(expected_calibration_error(counts) - top1) <= STEP / 2 + FLOAT64
    each = [error(p[:, c], labels == c, bins) for c in range(len(logits))]
    assert abs(classwise_calibration_error(counts) - np.mean(each)) <= STEP / 2 + FLOAT64


def test_brier_score(pixels):
    """The sum over classes of the score of each class against the rest."""
    logits, target, bins = pixels
    p, labels = labelled(logits, target)
    each = [brier_score_loss(labels == c, p[:, c], pos_label=True) for c in range(p.shape[1])]
    found = brier(count_image(logits, target, bins, VOID))
    assert abs(found - sum(each)) <= STEP / 2 + FLOAT64
    assert abs(found - ((p - np.eye(p.shape[1])[labels]) ** 2).sum(1).mean()) <= STEP / 2 + FLOAT64


def nll_bound(logits):
    """log p = (x - max) - log(sum exp(x - max)) in float32: x - max, its exp (which takes over the
    error of x - max), a sum of C, a log and a difference, each of which rounds by `FLOAT32` times
    a value of at most the spread of the logits plus log C; exp and log by twice that."""
    spread, classes = float(logits.max() - logits.min()), len(logits)
    return FLOAT32 * (3 * spread + 4 * np.log(classes) + classes + 4)


def test_negative_log_likelihood(pixels):
    logits, target, bins = pixels
    _, labels = labelled(logits, target)
    exact = logits.double().flatten(1)[:, : len(labels)].softmax(0).T.numpy()
    expected = log_loss(labels, exact, labels=range(len(logits)))
    bound = NLL_STEP / 2 + nll_bound(logits) + FLOAT64
    assert bound < 1.5e-5
    assert abs(nll(count_image(logits, target, bins, VOID)) - expected) <= bound


def test_they_are_the_scores_of_a_results_table(pixels):
    logits, target, bins = pixels
    counts = count_image(logits, target, bins, VOID)
    found = scores(counts)
    expected = (
        expected_calibration_error(counts),
        classwise_calibration_error(counts),
        brier(counts),
        nll(counts),
    )
    assert tuple(found[name] for name in ("ece", "cece", "brier", "nll")) == expected
