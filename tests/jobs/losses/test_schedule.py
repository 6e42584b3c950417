"""The weights of a loss's terms over training: the paper's two ramps, and any other."""

import itertools
import math
from fractions import Fraction

import pytest

from jobs.losses.grammar import Knot, parse_loss, term_weights
from tests.jobs.oracles import alternating_ramp, naive_ramp

STEPS = 240  # of training: ramps begin and end at whole steps


def weights(name, i, total=STEPS, **ramps):
    return term_weights(parse_loss(name, **ramps).schedule, i / total)


def test_the_naive_ramp_is_the_papers_at_every_step():
    for i in range(STEPS):
        second = naive_ramp(i, STEPS)
        assert weights("DLNCE", i) == pytest.approx((1 - second, second), abs=1e-14)


def test_the_alternating_ramp_is_the_papers_at_every_step():
    for i in range(STEPS):
        second = alternating_ramp(i, STEPS)
        assert weights("DLACE", i) == pytest.approx((1 - second, second), abs=1e-14)


@pytest.mark.parametrize(
    ("i", "naive", "alternating"),
    [
        # of 10 steps; naive rises from step 3 to step 9, alternating falls to step 5, rises to 9
        (0, 0, 1),
        (1, 0, 0.8),
        (3, 0, 0.4),
        (4, 1 / 6, 0.2),
        (5, 2 / 6, 0),
        (6, 3 / 6, 1 - math.cos(math.pi / 8)),
        (7, 4 / 6, 1 - math.sqrt(0.5)),
        (8, 5 / 6, 1 - math.cos(3 * math.pi / 8)),
        (9, 1, 1),
    ],
)
def test_ten_steps_worked_out_by_hand(i, naive, alternating):
    assert weights("DLNCE", i, 10)[1] == pytest.approx(naive, abs=1e-15)
    assert weights("DLACE", i, 10)[1] == pytest.approx(alternating, abs=1e-15)


def test_the_first_step_is_the_dice_alone_or_the_cross_entropy_alone():
    assert weights("DLNCE", 0) == (1, 0)
    assert weights("DLACE", 0) == (0, 1)


@pytest.mark.parametrize("total", [1, 7, 30, 1000, 28_830])
def test_from_nine_tenths_on_the_second_term_is_exactly_alone(total):
    for name in ("DLNCE", "DLACE"):
        for i in (math.ceil(Fraction(9, 10) * total), total - 1, total):
            if i * 10 >= 9 * total:
                assert weights(name, i, total) == (0, 1)


def test_a_one_to_one_sum_stays_half_and_half():
    assert {weights("WDLWCE", i) for i in range(STEPS)} == {(0.5, 0.5)}
    assert {weights("FL", i) for i in range(STEPS)} == {(1.0,)}


def test_start_and_end_of_a_ramp_are_settings():
    for i in range(STEPS):  # 24 is a tenth of them, 96 four tenths
        rising = min(max((i - 24) / (96 - 24), 0), 1)
        assert weights("DLNCE", i, naive=(0.1, 0.4))[1] == pytest.approx(rising, abs=1e-14)
        second = max(1 - i / 24, 0) + 1 - math.cos(math.pi / 2 * rising)
        found = weights("DLACE", i, alternating=(0.1, 0.4))[1]
        assert found == pytest.approx(second, abs=1e-14)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0.0, (1, 0, 0)),  # before the first knot: as at the first knot
        (0.1, (1, 0, 0)),
        (0.2, (0.5, 0.5, 0)),  # linear: half way from .1 to .3
        (0.3, (0, 1, 0)),
        (0.4999, (0, 1, 0)),  # constant: a jump at .5
        (0.5, (0.25, 0.25, 0.5)),
        (0.6, (0.25, 0.25, 0.5)),
        # cosine from .6 to .9, a third of the way: 1 - cos(30 degrees) of the difference
        (0.7, tuple(a + (b - a) * (1 - math.sqrt(3) / 2)
                    for a, b in zip((0.25, 0.25, 0.5), (2, 0, 1), strict=True))),
        (0.8, tuple(a + (b - a) / 2 for a, b in zip((0.25, 0.25, 0.5), (2, 0, 1), strict=True))),
        (0.9, (2, 0, 1)),
        (1.0, (2, 0, 1)),  # and after the last one
    ],
)  # fmt: skip
def test_three_terms_with_all_kinds_of_knots(position, expected):
    schedule = (
        Knot(0.1, (1, 0, 0)),
        Knot(0.3, (0, 1, 0), "linear"),
        Knot(0.5, (0.25, 0.25, 0.5), "constant"),
        Knot(0.6, (0.25, 0.25, 0.5)),
        Knot(0.9, (2, 0, 1), "cosine"),
    )
    assert term_weights(schedule, position) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("name", ["DLNCE", "DLACE", "WDLWCE"])
def test_the_weights_of_a_papers_loss_sum_to_one(name):
    for i in range(STEPS):
        assert sum(weights(name, i)) == pytest.approx(1, abs=1e-15)
        assert min(weights(name, i)) >= 0


def test_the_ramps_are_continuous():
    for name in ("DLNCE", "DLACE"):
        path = [weights(name, i, 10_000)[1] for i in range(10_000)]
        assert max(abs(b - a) for a, b in itertools.pairwise(path)) < 5e-4
