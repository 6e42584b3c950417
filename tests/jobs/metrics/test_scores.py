"""Scores from counts: by hand, against scikit-learn, and against the formula itself."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, recall_score

from data_prep.settings import VOID
from jobs.metrics.counts import FIXED_POINT, Counts
from jobs.metrics.reference import count_image
from jobs.metrics.scores import (
    SCORES,
    accuracy,
    calibration,
    class_recall,
    classwise_calibration_error,
    expected_calibration_error,
    f1,
    harmonic_with_calibration,
    mean_iou,
    never_right,
    recall,
    reliability,
    scores,
    summarise,
)


def with_confusion(confusion):
    arrays = Counts.zeros(len(confusion), 10).as_arrays()
    table = np.array(confusion, np.int64)
    return Counts.from_arrays({**arrays, "confusion": table, "pixels": table.sum()})


def scored(p, labels, bins=10):
    """Counts of pixels with scores `p` [n, C]."""
    logits = torch.from_numpy(np.log(p)).float().T[:, None, :]
    return count_image(logits, torch.from_numpy(labels)[None], bins, VOID)


def random_pixels(seed, n=4000, num_classes=4):
    generator = np.random.default_rng(seed)
    p = generator.dirichlet([0.4] * num_classes, n)
    return p, generator.integers(0, num_classes, n)


# label  predicted 0  1  2     recall   F1                 IoU
#   0              6  2  0     6/8      12/(8 + 7) = .8    6/9
#   1              1  3  0     3/4       6/(4 + 5) = 2/3   3/6
#   2              0  0  4     4/4       8/(4 + 4) = 1     4/4
BY_HAND = [[6, 2, 0], [1, 3, 0], [0, 0, 4]]


def test_scores_of_sixteen_pixels_by_hand():
    counts = with_confusion(BY_HAND)
    assert accuracy(counts) == 13 / 16
    assert recall(counts) == pytest.approx((0.75 + 0.75 + 1) / 3)
    assert f1(counts) == pytest.approx((0.8 + 2 / 3 + 1) / 3)
    assert mean_iou(counts) == pytest.approx((6 / 9 + 3 / 6 + 1) / 3)


def test_scores_agree_with_scikit_learn():
    p, labels = random_pixels(0)
    counts, predicted = scored(p, labels), p.argmax(1)
    assert accuracy(counts) == pytest.approx(accuracy_score(labels, predicted))
    assert recall(counts) == pytest.approx(recall_score(labels, predicted, average="macro"))
    assert f1(counts) == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert mean_iou(counts) == pytest.approx(jaccard_score(labels, predicted, average="macro"))


def test_a_class_absent_from_validation_is_not_averaged():
    # class 2 labels nothing, and is predicted once
    counts = with_confusion([[4, 0, 0], [0, 3, 1], [0, 0, 0]])
    assert recall(counts) == pytest.approx((1 + 0.75) / 2)
    assert f1(counts) == pytest.approx((1 + 6 / 7) / 2)
    assert math.isnan(class_recall(counts)[2])


def test_f1_is_undefined_when_a_present_class_is_never_predicted_or_never_right():
    unpredicted = with_confusion([[4, 0], [2, 0]])
    mistaken = with_confusion([[3, 1], [2, 0]])
    assert math.isnan(f1(unpredicted))
    assert math.isnan(f1(mistaken))
    assert recall(unpredicted) == 0.5  # recall of a class that is never found is 0
    assert never_right(unpredicted).tolist() == [False, True]
    assert never_right(mistaken).tolist() == [False, True]


def cal_by_its_formula(p, labels, bins):
    """float64, from pixels, knowing nothing of counts."""
    score, true = p.ravel(), np.eye(p.shape[1])[labels].ravel()
    place = np.minimum((score * bins).astype(int), bins - 1)
    gaps = [
        abs(true[place == i].mean() - score[place == i].mean()) if (place == i).any() else 0.0
        for i in range(bins)
    ]
    return 1 - 4 / bins * sum(gaps)


@pytest.mark.parametrize("bins", [1, 5, 10, 15])
def test_cal_agrees_with_its_formula(bins):
    p, labels = random_pixels(1)
    assert calibration(scored(p, labels, bins)) == pytest.approx(
        cal_by_its_formula(p, labels, bins), abs=1e-5
    )


def test_cal_of_a_classifier_that_knows_what_it_does_not_know_is_near_one():
    generator = np.random.default_rng(2)
    p = generator.dirichlet([0.5] * 3, 40_000)
    labels = np.array([generator.choice(3, p=row) for row in p])
    assert calibration(scored(p, labels)) > 0.97


def test_cal_by_hand_with_empty_bins():
    # two classes, N = 10: scores .95 (right in 1 of 2) and .05 (true in 1 of 2)
    # gaps: |.5 - .95| = .45 and |.5 - .05| = .45, eight bins empty: 1 - .4 * .9 = .64
    counts = scored(np.array([[0.95, 0.05], [0.95, 0.05]]), np.array([0, 1]))
    assert calibration(counts) == pytest.approx(0.64, abs=1e-6)
    assert expected_calibration_error(counts) == pytest.approx(0.45, abs=1e-6)
    assert classwise_calibration_error(counts) == pytest.approx(0.45, abs=1e-6)


def test_cal_falls_below_zero_and_takes_the_harmonic_means_along():
    # sure and always wrong, over all bins that one pixel's scores can reach
    p = np.concatenate([[[q, 1 - q]] for q in np.linspace(0.55, 0.95, 5)])
    counts = scored(p, np.ones(5, int))
    values = scores(counts)
    assert values["cal"] < 0
    assert math.isnan(values["s_acc"]) and math.isnan(values["s_rec"])


@pytest.mark.parametrize(
    ("acc", "rec", "cal", "s_acc", "s_rec"),
    [
        (0.87, 0.64, 0.89, 0.88, 0.75),  # SBD, FCN, WDL
        (0.83, 0.34, 0.84, 0.83, 0.49),  # Cityscapes, FCN, WDL
        (0.84, 0.47, 0.71, 0.77, 0.56),  # Cityscapes, DeepLabV3, FL
    ],
)
def test_harmonic_means_are_those_of_the_papers_table(acc, rec, cal, s_acc, s_rec):
    assert harmonic_with_calibration(cal, acc) == pytest.approx(s_acc, abs=0.011)
    assert harmonic_with_calibration(cal, rec) == pytest.approx(s_rec, abs=0.011)


def test_harmonic_means_need_a_positive_cal():
    assert harmonic_with_calibration(0.8, 0.6) == pytest.approx(0.96 / 1.4)
    assert harmonic_with_calibration(0.5, 0.0) == 0.0
    assert math.isnan(harmonic_with_calibration(0.0, 0.9))
    assert math.isnan(harmonic_with_calibration(math.nan, 0.9))


def test_expected_calibration_errors_agree_with_pixels():
    p, labels = random_pixels(3)
    counts = scored(p, labels)

    def ece(score, hit):
        place = np.minimum((score * 10).astype(int), 9)
        return sum(
            (place == i).mean() * abs(hit[place == i].mean() - score[place == i].mean())
            for i in set(place)
        )

    assert expected_calibration_error(counts) == pytest.approx(
        ece(p.max(1), p.argmax(1) == labels), abs=1e-4
    )
    each = [ece(p[:, c], labels == c) for c in range(4)]
    assert classwise_calibration_error(counts) == pytest.approx(np.mean(each), abs=1e-4)


def test_reliability_of_an_empty_bin_is_nan():
    score, frequency = reliability(np.array([[4, 1, 2 * FIXED_POINT], [0, 0, 0]]))
    assert (score[0], frequency[0]) == (0.5, 0.25)
    assert np.isnan([score[1], frequency[1]]).all()


def test_without_a_labelled_pixel_no_score_is_defined():
    values = scores(Counts.zeros(3, 10))
    assert tuple(values) == SCORES
    assert all(math.isnan(value) for value in values.values())


def test_the_first_six_scores_are_the_papers():
    assert SCORES[:6] == ("acc", "f1", "rec", "cal", "s_acc", "s_rec")


def test_a_mean_over_seeds_is_undefined_if_one_seed_is():
    assert summarise([0.5, 0.7]).mean == pytest.approx(0.6)
    assert summarise([0.5, 0.7]).std == pytest.approx(0.2 / math.sqrt(2))
    broken = summarise([0.5, math.nan, 0.7, 0.9])
    assert math.isnan(broken.mean) and math.isnan(broken.std)
    assert (broken.defined, broken.n) == (3, 4)


def test_one_seed_has_a_mean_but_no_spread():
    one = summarise([0.5])
    assert one.mean == 0.5 and math.isnan(one.std)
    assert math.isnan(summarise([]).mean)
