"""Counts of an image add up to the counts of a validation set, to the last bit."""

import random

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss

from data_prep.settings import VOID
from jobs.metrics.counts import FIXED_POINT, NLL_FIXED_POINT, Counts
from jobs.metrics.reference import LARGEST_NLL, count_image


def an_image(seed, num_classes=5, size=(13, 17), void=0.1):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_classes, *size, generator=generator)
    target = torch.randint(num_classes, size, generator=generator)
    target[torch.rand(size, generator=generator) < void] = VOID
    return logits, target.to(torch.uint8)


def labelled(logits, target):
    """(scores [n, C] in float64, labels [n]) of the pixels that are not void."""
    keep = target.numpy() != VOID
    scores = logits.double().softmax(0).numpy().transpose(1, 2, 0)
    return scores[keep], target.numpy()[keep].astype(int)


def test_three_pixels_counted_by_hand():
    # scores:  pixel 0: (.5, .25, .25)   label 0, predicted 0
    #          pixel 1: (.25, .5, .25)   label 2, predicted 1
    #          pixel 2: (1, 0, 0)        label 0, predicted 0
    #          pixel 3: void
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1, 0, 0], [0.3, 0.3, 0.4]])
    target = torch.tensor([[0, 2, 0, VOID]], dtype=torch.uint8)
    counts = count_image(scores.log().clamp(min=-1e4).T[:, None, :], target, bins=4, void=VOID)

    assert counts.confusion.tolist() == [[2, 0, 0], [0, 0, 0], [0, 1, 0]]
    half, quarter, one = FIXED_POINT // 2, FIXED_POINT // 4, FIXED_POINT
    # with four bins .25 falls into bin 1, .5 into bin 2, and 1 into the last, not beyond it
    nothing = [0, 0, 0]
    assert counts.class_bins.tolist() == [
        [nothing, [1, 0, quarter], [1, 1, half], [1, 1, one]],
        [[1, 0, 0], [1, 0, quarter], [1, 0, half], nothing],
        [[1, 0, 0], [2, 1, 2 * quarter], nothing, nothing],
    ]
    assert counts.top1_bins.tolist() == [nothing, nothing, [2, 1, one], [1, 1, one]]
    # brier: (.25 + .0625 + .0625) + (.0625 + .25 + .5625) + 0;  nll: log 2 + log 4 + 0
    assert counts.brier == round((0.375 + 0.875) * FIXED_POINT)
    assert counts.nll == round(np.log(2) * NLL_FIXED_POINT) + round(np.log(4) * NLL_FIXED_POINT)
    assert (counts.pixels, counts.void, counts.images) == (3, 1, 1)


def test_confusion_agrees_with_scikit_learn():
    logits, target = an_image(0)
    scores, labels = labelled(logits, target)
    expected = confusion_matrix(labels, scores.argmax(1), labels=range(5))
    np.testing.assert_array_equal(count_image(logits, target, 10, VOID).confusion, expected)


def test_brier_and_nll_agree_with_float64():
    logits, target = an_image(1)
    scores, labels = labelled(logits, target)
    counts = count_image(logits, target, 10, VOID)
    n = len(labels)
    brier = ((scores - np.eye(5)[labels]) ** 2).sum()
    assert int(counts.brier) / FIXED_POINT == pytest.approx(brier, abs=n / FIXED_POINT)
    nll = log_loss(labels, scores, labels=range(5)) * n
    assert int(counts.nll) / NLL_FIXED_POINT == pytest.approx(nll, abs=n / NLL_FIXED_POINT)


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_bins_agree_with_a_loop_over_pixels(bins):
    logits, target = an_image(2, num_classes=3)
    counts = count_image(logits, target, bins, VOID)
    expected, top1 = np.zeros((3, bins, 3), np.int64), np.zeros((bins, 3), np.int64)
    p = logits.softmax(0).numpy().transpose(1, 2, 0)[target.numpy() != VOID]
    for scores, label in zip(p, target.numpy()[target.numpy() != VOID], strict=True):
        for c, score in enumerate(scores):
            place = min(int(score * np.float32(bins)), bins - 1)
            row = [1, int(c == label), round(float(score) * FIXED_POINT)]
            expected[c, place] += row
            if c == scores.argmax():
                top1[place] += row
    np.testing.assert_array_equal(counts.class_bins, expected)
    np.testing.assert_array_equal(counts.top1_bins, top1)


def test_any_split_of_the_images_gives_the_same_sums():
    images = [count_image(*an_image(seed), bins=10, void=VOID) for seed in range(8)]
    whole = sum(images, Counts.zeros(5, 10))
    for _ in range(5):
        random.Random(3).shuffle(images)
        first = sum(images[:3], Counts.zeros(5, 10))
        second = sum(images[3:], Counts.zeros(5, 10))
        assert (second + first).equals(whole)
    assert whole.images == 8


def test_one_image_cut_in_two_counts_the_same():
    logits, target = an_image(4)
    left = count_image(logits[:, :, :6], target[:, :6], 10, VOID)
    right = count_image(logits[:, :, 6:], target[:, 6:], 10, VOID)
    whole = count_image(logits, target, 10, VOID).as_arrays()
    for name, array in (left + right).as_arrays().items():
        if name != "images":
            np.testing.assert_array_equal(array, whole[name])


def test_where_classes_tie_the_lowest_is_the_prediction():
    logits = torch.zeros(4, 1, 3)
    logits[0, 0, 1] = -1.0
    target = torch.tensor([[3, 3, 3]])
    assert count_image(logits, target, 10, VOID).confusion[3].tolist() == [2, 1, 0, 0]


def test_a_pixel_of_hopeless_score_has_a_large_but_finite_nll():
    logits = torch.tensor([0.0, -3e38])[:, None, None]
    counts = count_image(logits, torch.tensor([[1]]), 10, VOID)
    assert counts.nll == LARGEST_NLL * NLL_FIXED_POINT


def test_an_image_without_labels_counts_as_an_image():
    logits, target = an_image(5, void=2.0)
    counts = count_image(logits, target, 10, VOID)
    assert (counts.pixels, counts.void, counts.images) == (0, target.numel(), 1)
    assert not counts.confusion.any()


def test_half_precision_logits_are_counted_in_float32():
    logits, target = an_image(6)
    low = logits.half()
    assert count_image(low, target, 10, VOID).equals(count_image(low.float(), target, 10, VOID))


def test_a_label_that_is_no_class_is_refused():
    logits, target = an_image(7)
    target[0, 0] = 5
    with pytest.raises(ValueError, match="label 5 is neither one of 5 classes nor void"):
        count_image(logits, target, 10, VOID)


def test_logits_that_are_not_numbers_are_refused():
    logits, target = an_image(8, void=0)
    logits[2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="nan or infinity"):
        count_image(logits, target, 10, VOID)


def test_shapes_that_do_not_fit_are_refused():
    logits, target = an_image(9)
    with pytest.raises(ValueError, match=r"\[C, H, W\]"):
        count_image(logits, target.T, 10, VOID)
    with pytest.raises(ValueError, match="cannot be added"):
        Counts.zeros(3, 10) + Counts.zeros(3, 5)


def test_counts_survive_the_way_through_arrays():
    counts = count_image(*an_image(10), bins=10, void=VOID)
    assert Counts.from_arrays(counts.as_arrays()).equals(counts)
    assert not counts.equals(counts + counts)


def test_counts_in_floats_are_refused():
    arrays = Counts.zeros(3, 10).as_arrays()
    with pytest.raises(ValueError, match="brier is float64"):
        Counts.from_arrays({**arrays, "brier": np.array(0.5)})
    with pytest.raises(ValueError, match=r"top1_bins is \(9, 3\)|class_bins is"):
        Counts.from_arrays({**arrays, "top1_bins": np.zeros((9, 3), np.int64)})
