"""Every loss against the paper's formulas, on whole batches and on the shares of many ranks."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from jobs.losses.functional import LOSSES, combined_loss, inverse_frequencies
from jobs.losses.grammar import KINDS, parse_loss, term_weights
from tests.jobs import oracles
from tests.jobs.meeting_point import MeetingPoint
from tests.jobs.oracles import VOID, a_batch

SINGLE = ["CE", "WCE", "DL", "WDL", "FL", "WFL", "TL", "WTL", "CEMP", "WCEMP", "FLMP", "WFLMP",
          "FL[0]", "WFL[0.5]", "WCEMP[2,0.5]", "FLMP[1,1.5,0.2]"]  # fmt: skip
PAIRS = ["DLCE", "WDLWCE", "DLNWCE", "WDLNCE", "FLACE", "WDLAWCE", "WFLCE", "WTLNCEMP", "CEMPCE"]
WEIGHTS = (0.4, 2.5, 0.3, 0.8)  # of four classes


def loss_of(name, logits, target, position=0.0, weights=WEIGHTS, **ranks):
    logits, weights = torch.as_tensor(logits), torch.tensor(weights, dtype=torch.float64)
    return combined_loss(logits, target, parse_loss(name), position, weights, VOID, **ranks)


def gradient_of(name, logits, target, position=0.0, **options):
    """Value and gradient of a loss."""
    logits = logits.clone().requires_grad_()
    value = loss_of(name, logits, target, position, **options)
    value.backward()
    return value.detach(), logits.grad


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


# --- worked out by hand -----------------------------------------------------------------------


@pytest.fixture
def four_pixels():
    """A 2x2 image of three classes.

    scores (1/2, 1/4, 1/4) label 0    scores (1/4, 1/2, 1/4) label 2
    scores (1/4, 1/4, 1/2) label 2    void

    Of the true class p = 1/2, 1/4, 1/2. Classes have 1, 0 and 2 pixels: inverse 1, 0, 1/2, and
    scaled to the sum 3 the weights are 2, 0, 1.
    """
    scores = [[[1 / 2, 1 / 4], [1 / 4, 0.9]], [[1 / 4, 1 / 2], [1 / 4, 0.05]],
              [[1 / 4, 1 / 4], [1 / 2, 0.05]]]  # fmt: skip
    target = torch.tensor([[[0, 2], [2, VOID]]])
    return torch.tensor(scores, dtype=torch.float64).log()[None], target


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # (log 2 + log 4 + log 2) / 3
        ("CE", 4 / 3 * np.log(2)),
        # (2 log 2 + 1 log 4 + 1 log 2) / (2 + 1 + 1)
        ("WCE", 5 / 4 * np.log(2)),
        # ((1/2)^2 log 2 + (3/4)^2 2 log 2 + (1/2)^2 log 2) / 3 = (1/4 + 9/8 + 1/4) / 3 log 2
        ("FL", 13 / 24 * np.log(2)),
        # (2/4 + 9/8 + 1/4) / 4 log 2
        ("WFL", 15 / 32 * np.log(2)),
        # p g: 1/2 + 1/4 + 1/2 = 5/4;  g^2: 3;  p^2: 3 (1/4 + 1/16 + 1/16) = 9/8
        ("DL", 1 - 2 * (5 / 4 + 1) / (3 + 9 / 8 + 1 + 1e-5)),
        # p g: 2/2 + 1/4 + 1/2 = 7/4;  g^2: 2 + 1 + 1 = 4
        # p^2: 2 (1/4 + 1/16 + 1/16) of class 0 and 1/16 + 1/16 + 1/4 of class 2 = 9/8
        ("WDL", 1 - 2 * (7 / 4 + 1) / (4 + 9 / 8 + 1 + 1e-5)),
        # class 0: p g 1/2, p (1 - g) 1/2, missed 1/2; class 1: p (1 - g) 1; class 2: p g 3/4,
        # p (1 - g) 1/4, missed 5/4
        ("TL", 1 - (1.5 / 2 + 1 / 1.3 + 1.75 / 2.7) / 3),
        ("WTL", 1 - (2 * 1.5 / 2 + 1.75 / 2.7) / 3),
        ("TL[1,1]", 1 - (1.5 / 2.5 + 1 / 2 + 1.75 / 3.25) / 3),
        # m = 0.3 of 3 pixels: no loss is capped. n^(-1/q) (sum l^q)^(1/q)
        ("CEMP", np.log(2) * 3 ** (-0.3 / 1.3) * (2 + 2 ** (13 / 3)) ** (3 / 13)),
        # losses 2/4, 1/4, 1/4 of the weights, times 3: 3/2 log 2, 3/2 log 2, 3/4 log 2
        ("WCEMP", 3 / 4 * np.log(2) * 3 ** (-3 / 13) * (1 + 2 * 2 ** (13 / 3)) ** (3 / 13)),
        # half of each
        ("DLCE", (1 - 4.5 / (5.125 + 1e-5)) / 2 + 2 / 3 * np.log(2)),
        ("WDLWCE", (1 - 5.5 / (6.125 + 1e-5)) / 2 + 5 / 8 * np.log(2)),
    ],
)
def test_four_pixels_worked_out_by_hand(four_pixels, name, expected):
    value = loss_of(name, *four_pixels, weights=(2.0, 0.0, 1.0))
    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_class_weights_worked_out_by_hand():
    assert inverse_frequencies([1, 0, 2]).tolist() == [2, 0, 1]


@pytest.mark.parametrize("name", ["WCE", "WFL", "WCEMP", "WFLMP"])
def test_a_weighted_mean_depends_on_ratios_of_the_weights_alone(four_pixels, name):
    value, small = (loss_of(name, *four_pixels, weights=(2 * s, 0, s)) for s in (1, 1e-3))
    torch.testing.assert_close(small, value, rtol=1e-12, atol=0)


def test_class_weights_are_inverse_frequencies_that_sum_to_the_number_of_classes():
    pixels = [5_000_000_007, 3, 0, 812, 70_000]
    weights = inverse_frequencies(pixels)
    assert weights.dtype == np.float64
    assert weights.sum() == pytest.approx(5, rel=1e-14)
    assert weights[2] == 0
    present = [0, 1, 3, 4]
    products = weights[present] * np.array(pixels)[present]
    np.testing.assert_allclose(products, products[0], rtol=1e-14)


def test_no_class_weighs_anything_where_nothing_is_labelled():
    assert inverse_frequencies([0, 0]).tolist() == [0, 0]


# --- independent implementations --------------------------------------------------------------


@pytest.mark.parametrize("name", SINGLE)
def test_a_loss_agrees_with_a_loop_over_pixels(name):
    logits, target = a_batch(1)
    expected = oracles.single(name, logits, target, WEIGHTS)
    assert float(loss_of(name, logits, target)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SINGLE)
def test_a_gradient_agrees_with_differences_of_the_loop(name):
    logits, target = a_batch(2, images=2, num_classes=3, size=(2, 3))
    weights = WEIGHTS[:3]
    expected = oracles.numeric_gradient(
        lambda moved: oracles.single(name, moved, target, weights), logits
    )
    _, gradient = gradient_of(name, logits, target, weights=weights)
    np.testing.assert_allclose(gradient, expected, atol=1e-9)


@pytest.mark.parametrize("i", [0, 1, 29, 30, 45, 50, 51, 70, 89, 90, 99])
@pytest.mark.parametrize("name", ["DLNCE", "WDLNWCE", "FLNWCE", "DLACE", "WDLAWCE", "FLACE"])
def test_a_scheduled_loss_is_the_ramp_between_its_two_losses(name, i):
    logits, target = a_batch(3, size=(3, 4))
    kind = "N" if "N" in name else "A"
    first, second = name.split(kind)
    ramp = {"N": oracles.naive_ramp, "A": oracles.alternating_ramp}[kind](i, 100)
    values = [oracles.single(term, logits, target, WEIGHTS) for term in (first, second)]
    expected = (1 - ramp) * values[0] + ramp * values[1]
    assert float(loss_of(name, logits, target, i / 100)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("position", [0.0, 0.45, 0.7, 0.99])
@pytest.mark.parametrize("join", ["", "N", "A"])
def test_a_loss_is_linear_in_its_terms(join, position):
    """Every two terms in each order: so ranks, bundles and kernels are tested on terms alone."""
    logits, target = a_batch(4, size=(3, 4))
    terms = [weighting + kind for kind in KINDS for weighting in ("", "W")]
    alone = {term: gradient_of(term, logits, target) for term in terms}
    for first, second in product(terms, repeat=2):
        name = first + join + second
        loss = parse_loss(name)
        assert tuple(term.name for term in loss.terms) == (first, second) and loss.name == name
        shares = term_weights(loss.schedule, position)
        for found, *parts in zip(
            gradient_of(name, logits, target, position), alone[first], alone[second], strict=True
        ):
            expected = shares[0] * parts[0] + shares[1] * parts[1]
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_that_of_torch(weighted):
    logits, target = a_batch(4)
    theirs = logits.clone().requires_grad_()
    weights = torch.tensor(WEIGHTS, dtype=torch.float64) if weighted else None
    expected = torch.nn.CrossEntropyLoss(weight=weights, ignore_index=VOID)(theirs, target)
    expected.backward()
    value, gradient = gradient_of("WCE" if weighted else "CE", logits, target)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-13)
    torch.testing.assert_close(gradient, theirs.grad, rtol=1e-12, atol=1e-15)


def test_focal_loss_of_two_classes_is_the_sigmoid_one_of_torchvision():
    logits, target = a_batch(5, num_classes=2, void=0)
    margin = logits[:, 1] - logits[:, 0]
    expected = sigmoid_focal_loss(margin, target.double(), alpha=-1, gamma=2, reduction="mean")
    value = loss_of("FL", logits, target, weights=(1.0, 1.0))
    assert float(value) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", [*SINGLE, *PAIRS])
def test_gradients_pass_gradcheck(name):
    logits, target = a_batch(6, images=3, size=(2, 3))
    target[1] = VOID
    assert (target[[0, 2]] == VOID).any()
    assert torch.autograd.gradcheck(
        lambda x: loss_of(name, x, target, position=0.6), logits.requires_grad_()
    )


def test_a_loss_with_a_gradient_through_a_global_sum_fails_gradcheck(monkeypatch):
    """On several ranks a global sum carries no gradient, so on one rank it must not either."""

    def wrong(log_probs, target, labelled, class_weights, global_sum):
        value = log_probs[:, 0].exp().sum()
        return value / global_sum(value + 1)

    monkeypatch.setitem(LOSSES, "CE", wrong)
    logits, target = a_batch(6, images=3, size=(2, 3))
    assert not torch.autograd.gradcheck(
        lambda x: loss_of("CE", x, target), logits.requires_grad_(), raise_exception=False
    )


@pytest.mark.parametrize("name", ["WDLNWCE", "WDLAWCE"])
def test_a_term_that_counts_nothing_is_not_computed(name, monkeypatch):
    logits, target = a_batch(7)
    expected = float(loss_of("WCE", logits, target))
    monkeypatch.delitem(LOSSES, "DL")
    assert float(loss_of(name, logits, target, position=0.9)) == expected


def test_a_perfect_prediction_has_a_dice_loss_slightly_below_zero():
    _, target = a_batch(8, void=0)
    logits = 60 * functional.one_hot(target, 4).permute(0, 3, 1, 2).double()
    n = target[0].numel()
    expected = 1 - 2 * (n + 1) / (2 * n + 1 + 1e-5)  # p = g everywhere
    assert float(loss_of("DL", logits, target)) == pytest.approx(expected, abs=1e-14)
    assert -0.05 < expected < 0


# --- void pixels, and numbers at the edge -----------------------------------------------------


@pytest.mark.parametrize("junk", [0.0, 1e4, 1e300, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", [*SINGLE, "WDLWCE", "FLAWCE"])
def test_what_a_void_pixel_holds_changes_neither_value_nor_gradient(name, junk):
    logits, target = a_batch(9)
    void = (target == VOID).unsqueeze(1).expand_as(logits)
    value, gradient = gradient_of(name, logits, target, position=0.2)
    other = logits.clone()
    other[:, :2][void[:, :2]] = junk
    other_value, other_gradient = gradient_of(name, other, target, position=0.2)
    assert torch.equal(other_value, value)
    assert torch.equal(other_gradient, gradient)
    assert not gradient[void].any()
    assert gradient[~void].all()


@pytest.mark.parametrize("name", [*SINGLE, *PAIRS])
def test_an_image_without_a_label_gets_no_gradient(name):
    logits, target = a_batch(10)
    target[1] = VOID
    value, gradient = gradient_of(name, logits, target, position=0.6)
    assert torch.isfinite(value)
    assert not gradient[1].any()
    assert gradient[0].any() and gradient[2].any()


@pytest.mark.parametrize("name", ["DL", "WDL"])
def test_an_image_without_a_label_has_a_dice_loss_near_minus_one(name):
    logits, target = a_batch(11, images=2)
    without = loss_of(name, logits[:1], torch.full_like(target[:1], VOID))
    assert float(without) == pytest.approx(1 - 2 / (1 + 1e-5), rel=1e-12)
    assert float(without) == pytest.approx(-1, abs=1e-4)
    target[0] = VOID  # it stays one of the two images of the mean
    half = (float(without) + float(loss_of(name, logits[1:], target[1:]))) / 2
    assert float(loss_of(name, logits, target)) == pytest.approx(half, rel=1e-12)


@pytest.mark.parametrize("name", [*SINGLE, *PAIRS])
@pytest.mark.parametrize("logits_of_void", [1.0, float("inf")])
def test_a_batch_without_a_label_has_a_finite_value_and_no_gradient(name, logits_of_void):
    logits, target = a_batch(12)
    logits[0] = logits_of_void
    value, gradient = gradient_of(name, logits, torch.full_like(target, VOID), position=0.6)
    assert torch.isfinite(value)
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("name", SINGLE)
def test_labels_whose_class_weighs_nothing_are_finite(name):
    logits, target = a_batch(13)
    target[target != VOID] = 2
    value, gradient = gradient_of(name, logits, target, weights=(1.0, 2.0, 0.0, 1.0))
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    if name in ("WCE", "WFL"):
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*SINGLE, "WDLNWCE"])
def test_half_precision_logits_do_not_overflow(name, dtype):
    """60 000 pixels with large logits: in half precision their sums would be infinite."""
    logits, target = a_batch(14, images=1, size=(200, 300))
    half = (500 * logits).to(dtype)
    value, gradient = gradient_of(name, half, target, position=0.6)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.isfinite(gradient).all()
    expected = float(loss_of(name, half.double(), target, position=0.6))
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", SINGLE)
def test_certain_and_wrong_by_far_is_finite(name):
    logits = torch.tensor([1e30, -1e30, 0.0, 0.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    value, gradient = gradient_of(name, logits, torch.tensor([[[0, 1], [2, 3]]]))
    assert torch.isfinite(value) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_an_impossible_class_at_a_void_pixel_is_nothing_to_a_loss_function(kind):
    logits, target = a_batch(16)
    log_probs = torch.log_softmax(logits, dim=1)
    other = log_probs.masked_fill((target == VOID).unsqueeze(1), -float("inf"))
    found = []
    for scores in (log_probs, other):
        scores = scores.requires_grad_()
        value = LOSSES[kind](scores, target, target != VOID, torch.tensor(WEIGHTS), lambda x: x)
        found.append((value, *torch.autograd.grad(value, scores)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_the_focal_loss_of_a_nearly_certain_pixel_keeps_its_digits():
    """1 - p from log p = -1e-4 has three digits in single precision if p is computed first."""
    log_probs, target = torch.full((1, 1, 1, 1), -1e-4), torch.zeros(1, 1, 1).long()
    value = LOSSES["FL"](log_probs, target, target == 0, None, lambda x: x)
    assert float(value) == pytest.approx(np.expm1(-1e-4) ** 2 * 1e-4, rel=1e-6, abs=0)


# --- many ranks -------------------------------------------------------------------------------


def on_shares(name, logits, target, sizes, position):
    """Value and gradient of every rank's part."""
    meeting = MeetingPoint(len(sizes))
    shares = zip(logits.split(sizes), target.split(sizes), strict=True)
    with ThreadPoolExecutor(len(sizes)) as ranks:
        parts = [
            ranks.submit(gradient_of, name, *share, position, global_sum=meeting.global_sum(rank))
            for rank, share in enumerate(shares)
        ]
        return [part.result() for part in parts]


@pytest.mark.parametrize("sizes", [[1, 4, 2], [2, 5], [0, 3, 4], [1] * 7])
@pytest.mark.parametrize("name", [*SINGLE, *PAIRS])
def test_the_parts_of_uneven_ranks_add_up_to_the_whole_batch(name, sizes):
    logits, target = a_batch(15, images=7)
    target[:1] = VOID  # all that the first rank has, if it has anything
    target[2, :3] = VOID
    value, gradient = gradient_of(name, logits, target, position=0.6)
    parts = on_shares(name, logits, target, sizes, position=0.6)
    assert relative(sum(part for part, _ in parts), value) < 1e-12
    assert relative(torch.cat([g for _, g in parts]), gradient) < 1e-12


@pytest.mark.parametrize("name", [*SINGLE, *PAIRS])
def test_a_mean_of_the_ranks_own_means_would_be_another_loss(name):
    logits, target = a_batch(15, images=7)
    target[:1] = VOID
    target[2, :3] = VOID
    _, gradient = gradient_of(name, logits, target, position=0.6)
    shares = zip(logits.split([1, 4, 2]), target.split([1, 4, 2]), strict=True)
    own = [gradient_of(name, *share, position=0.6)[1] / 3 for share in shares]
    assert relative(torch.cat(own), gradient) > 0.1
