"""Counting in one pass decides as exact arithmetic does, but for pixels a few last places from
another decision; and so does the plain way, which it replaces.

A last place (ulp) is that of the largest logit around a pixel. Every decision is made by float64 as
well, and a pixel is near another one if 4 ulp of its logits, and `SCORE_ULPS` of its score, would
lead there. All other pixels must be counted where float64 has them.
"""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch

from data_prep.settings import VOID
from jobs.kernels import fused_counts
from jobs.kernels.fused_counts import count_upsampled
from jobs.metrics.counts import FIXED_POINT, NLL_FIXED_POINT
from jobs.metrics.reference import LARGEST_NLL, count_image
from jobs.models.build import upsample
from jobs.spec.protocol import Protocol
from jobs.training.evaluate import count

LOGIT_ULPS = 4
# PyTorch's softmax takes an exp that may be off by 20
SCORE_ULPS = {"fused": 4, "reference": 24}
# classes, logits, pixels, scale of the logits, bins
SHAPES = [
    (5, (5, 7), (40, 56), 3.0, 10),
    (21, (9, 12), (70, 93), 3.0, 10),
    (3, (5, 7), (37, 50), 0.01, 7),
    (4, (5, 7), (40, 56), 80.0, 10),
    (4, (5, 7), (40, 56), 1e4, 10),
    (6, (4, 4), (30, 29), 5.0, 100),
    (2, (3, 9), (20, 601), 3.0, 1),
    (1, (2, 40), (5, 700), 3.0, 10),  # rows of scores that add up to more than 2^32 steps
    (1, (2, 40), (130, 400), 3.0, 10),  # more blocks than a place of the sums bears
    (2, (2, 3), (5, 900), 3.0, 4),
    (5, (30, 40), (13, 17), 3.0, 10),  # smaller than the logits
    (5, (12, 5), (7, 45), 3.0, 2),
    (1, (3, 4), (20, 30), 3.0, 10),
    (7, (6, 8), (6, 8), 3.0, 15),
    (3, (1, 1), (9, 11), 3.0, 10),
    (3, (2, 2), (1, 1), 3.0, 10),
    (255, (2, 3), (16, 24), 3.0, 10),
]
CASES = [(*shape, seed) for shape in SHAPES for seed in range(2)]


def an_image(classes, size, pixels, scale, seed=0, void=0.1):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(classes, *size, generator=generator)
    target = torch.randint(classes, pixels, generator=generator)
    target[torch.rand(pixels, generator=generator) < void] = VOID
    return logits, target.to(torch.uint8)


def by(counting, logits, target, bins, threads=1):
    return count(logits, target, Protocol(counting=counting, bins=bins), threads)


def between(places, pixels):
    """Return the weight of each place of the logits in each pixel, float64 [pixels, places].

    Positions are float32, as they are everywhere.
    """
    scale = np.float32(places) / np.float32(pixels)
    position = np.longdouble(scale) * (np.arange(pixels) + 0.5) - 0.5
    position = np.maximum(position.astype(np.float32), 0)
    first = np.minimum(position.astype(int), places - 1)
    far = (position - first.astype(np.float32)).astype(np.float64)
    share = np.zeros((pixels, places))
    np.add.at(share, (np.arange(pixels), first), 1 - far)
    np.add.at(share, (np.arange(pixels), np.minimum(first + 1, places - 1)), far)
    return share


def exactly(logits, target):
    """Of each labelled pixel its logits [n, C] in float64, the last place of the largest that it
    is between, and its label."""
    down, across = (between(*sizes) for sizes in zip(logits.shape[1:], target.shape, strict=True))
    z = np.einsum("yh,chw,xw->yxc", down, logits.double().numpy(), across)
    size = np.abs(logits.numpy()).max(0)
    around = [[size[np.ix_(row > 0, column > 0)].max() for column in across] for row in down]
    keep = target.numpy() != VOID
    return z[keep], np.spacing(np.float32(around))[keep].astype(float), target.numpy()[keep]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def tables(z, p, labels, bins, sure, sure_bin):
    """Confusion, class bins [C, N, 2] and top-1 bins [N, 2] of the pixels that are sure."""
    n, classes = z.shape
    confusion = np.zeros((classes, classes), int)
    best = z.argmax(1)
    np.add.at(confusion, (labels[sure], best[sure]), 1)
    place = np.minimum((p * bins).astype(int), bins - 1)
    class_bins, top = np.zeros((classes, bins, 2), int), np.zeros((bins, 2), int)
    for c in range(classes):
        np.add.at(class_bins[c, :, 0], place[sure_bin[:, c], c], 1)
        np.add.at(class_bins[c, :, 1], place[sure_bin[:, c] & (labels == c), c], 1)
    rows = np.arange(n)
    sure_top = sure & sure_bin[rows, best]
    np.add.at(top[:, 0], place[rows, best][sure_top], 1)
    np.add.at(top[:, 1], place[rows, best][sure_top & (labels == best)], 1)
    return confusion, class_bins, top


@pytest.mark.parametrize("counting", SCORE_ULPS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_only_pixels_next_to_another_decision_may_be_counted_otherwise(case, counting):
    classes, size, pixels, scale, bins, seed = case
    logits, target = an_image(classes, size, pixels, scale, seed)
    z, ulp, labels = exactly(logits, target)
    p, shift = softmax(z), 2 * LOGIT_ULPS * ulp
    two = np.sort(z, 1)[:, -2:]
    sure = two[:, -1] - two[:, 0] > shift if classes > 1 else np.ones(len(z), bool)
    reach = SCORE_ULPS[counting] * np.spacing(p.astype(np.float32)) + p * np.expm1(shift)[:, None]
    edges = np.arange(1, bins) / bins
    sure_bin = (np.abs(p[:, :, None] - edges) > reach[:, :, None]).all(-1)
    found = by(counting, logits, target, bins)
    confusion, class_bins, top = tables(z, p, labels, bins, sure, sure_bin)
    assert_all_but(found.confusion, confusion, (~sure).sum())
    assert_all_but(found.class_bins[..., 0], class_bins[..., 0], (~sure_bin).sum())
    true = sure_bin[np.arange(len(z)), labels]
    assert_all_but(found.class_bins[..., 1], class_bins[..., 1], (~true).sum())
    sure_top = sure & sure_bin[np.arange(len(z)), z.argmax(1)]
    assert_all_but(found.top1_bins[:, 0], top[:, 0], (~sure_top).sum())
    assert (found.top1_bins[:, 1] >= top[:, 1]).all()
    assert found.top1_bins[:, 1].sum() == np.trace(found.confusion)
    if scale < 100:  # else it would be a test of nothing
        assert sure_bin.mean() > 0.9 and sure.mean() > 0.9


def assert_all_but(found, certain, others):
    """Check that all certain pixels are counted, and beside them only the `others`."""
    assert (found >= certain).all()
    assert (found - certain).sum() == others


@pytest.mark.parametrize("counting", SCORE_ULPS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_sums_are_those_of_exact_arithmetic(case, counting):
    """To 2^-22 a pixel, 2^-16 for nll, and what the last places of logits are worth."""
    classes, size, pixels, scale, bins, seed = case
    logits, target = an_image(classes, size, pixels, scale, seed)
    z, ulp, labels = exactly(logits, target)
    p, rows = softmax(z), np.arange(len(z))
    found, worth = by(counting, logits, target, bins), 2 * LOGIT_ULPS * ulp.sum()
    bound = len(z) * 2.0**-22 + worth
    assert np.abs(found.class_bins[..., 2].sum(1) / FIXED_POINT - p.sum(0)).max() <= bound
    assert abs(found.top1_bins[:, 2].sum() / FIXED_POINT - p.max(1).sum()) <= bound
    brier = (p**2).sum(1) - 2 * p[rows, labels] + 1
    assert abs(int(found.brier) / FIXED_POINT - brier.sum()) <= bound + worth
    nll = np.log(np.exp(z - z.max(1)[:, None]).sum(1)) + z.max(1) - z[rows, labels]
    nll = np.minimum(nll, LARGEST_NLL)
    found_nll = int(found.nll) / NLL_FIXED_POINT
    assert abs(found_nll - nll.sum()) <= len(z) * 2.0**-16 + worth + nll.sum() * 2.0**-22
    assert (found.pixels, found.void) == (len(z), target.numel() - len(z))


def test_at_the_size_of_real_pictures_both_ways_count_the_same():
    """Sums to 2^-22 a pixel; confusion and bins but for less than a pixel in ten thousand."""
    logits, target = an_image(21, (65, 87), (520, 693), 3.0)
    fused, plain = (by(counting, logits, target, 10) for counting in SCORE_ULPS)
    assert np.abs(fused.confusion - plain.confusion).sum() <= 36
    assert np.abs(fused.class_bins - plain.class_bins)[..., :2].sum() <= 36
    sums = [np.abs(one.sum(-2)[..., 2] - other.sum(-2)[..., 2]).max()
            for one, other in ((fused.class_bins, plain.class_bins),
                               (fused.top1_bins, plain.top1_bins))]  # fmt: skip
    assert max(*sums, abs(fused.brier - plain.brier)) <= fused.pixels * FIXED_POINT / 2**22
    assert abs(fused.nll - plain.nll) <= fused.pixels * NLL_FIXED_POINT / 2**22


@pytest.mark.parametrize("bins", [1, 10])
def test_any_number_of_threads_gives_the_same_bits(bins):
    logits, target = an_image(5, (22, 40), (173, 319), 3.0)
    alone = by("fused", logits, target, bins)
    for threads in (2, 3, 5):
        assert by("fused", logits, target, bins, threads).equals(alone)


@pytest.mark.parametrize(("rows", "columns"), [(1, 512), (4096, 1), (50, 33)])
def test_any_tiles_give_the_same_bits(rows, columns, monkeypatch):
    logits, target = an_image(5, (11, 20), (87, 160), 3.0)
    whole = by("fused", logits, target, 10)
    monkeypatch.setattr(fused_counts, "MOST_ROWS", rows)
    monkeypatch.setattr(fused_counts, "MOST_COLUMNS", columns)
    assert by("fused", logits, target, 10).equals(whole)


def test_a_process_that_is_forked_counts_with_threads_of_its_own():
    logits, target = an_image(5, (22, 40), (173, 319), 3.0)
    expected = by("fused", logits, target, 10, threads=2)

    def counts_the_same():
        assert by("fused", logits, target, 10, threads=2).equals(expected)

    child = multiprocessing.get_context("fork").Process(target=counts_the_same)
    child.start()
    child.join(60)
    ended = child.exitcode
    child.kill()
    assert ended == 0


def test_where_classes_tie_the_lowest_is_the_prediction():
    logits, target = an_image(3, (5, 7), (40, 56), 3.0, void=0)
    thrice = torch.cat([logits, logits, logits])
    confusion = by("fused", thrice, target, 10).confusion
    assert not confusion[:, 3:].any() and confusion.sum() == target.numel()
    flat = torch.zeros(4, 5, 7)
    assert by("fused", flat, target, 10).confusion[:, 0].sum() == target.numel()


def test_logits_as_far_apart_as_float32_has_them():
    logits = torch.tensor([[[3e38]], [[-3e38]]])
    target = torch.tensor([[0, 1, VOID]], dtype=torch.uint8)
    found = by("fused", logits, target, 10)
    assert found.nll == LARGEST_NLL * NLL_FIXED_POINT
    assert found.brier == 2 * FIXED_POINT
    assert found.equals(by("reference", logits, target, 10))


def test_an_image_without_labels_counts_as_an_image():
    logits, target = an_image(5, (5, 7), (40, 56), 3.0, void=2.0)
    found = by("fused", logits, target, 10)
    assert (found.pixels, found.void, found.images) == (0, 40 * 56, 1)
    assert not any(found.as_arrays()[name].any() for name in ("confusion", "class_bins", "nll"))


def test_half_precision_logits_are_counted_in_float32():
    logits, target = an_image(5, (5, 7), (40, 56), 3.0)
    half = logits.half()
    assert by("fused", half, target, 10).equals(by("fused", half.float(), target, 10))


def test_logits_and_labels_may_lie_in_memory_as_they_like():
    logits, target = an_image(5, (7, 5), (56, 40), 3.0)
    turned = logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert by("fused", turned, target.T.contiguous().T, 10).equals(by("fused", logits, target, 10))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_numbers_are_refused(value):
    logits, target = an_image(5, (5, 7), (40, 56), 3.0)
    logits[2, 3, 4] = value
    with pytest.raises(ValueError, match="nan or infinity"):
        count_upsampled(logits, target, 10)


def test_what_the_plain_way_refuses_is_refused():
    logits, target = an_image(5, (5, 7), (40, 56), 3.0)
    for wrong, message in (
        ((logits[0], target, 10), r"\[C, h, w\]"),
        ((logits, target.float(), 10), "uint8"),
        ((logits, target, 0), "and a bin"),
        ((logits, torch.where(target == 3, 5, target).to(torch.uint8), 10),
         "label 5 is neither one of 5 classes nor void"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            count_upsampled(*wrong)
        with pytest.raises(ValueError):
            count_image(upsample(wrong[0][None], tuple(target.shape))[0]
                        if wrong[0].ndim == 3 else wrong[0], *wrong[1:], VOID)  # fmt: skip
