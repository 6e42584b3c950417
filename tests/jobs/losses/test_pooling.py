"""Loss max-pooling solves its optimisation problem exactly, on one rank and on many."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from jobs.losses.functional import alone
from jobs.losses.pooling import P, pooling_weights
from tests.jobs.meeting_point import MeetingPoint
from tests.jobs.oracles import max_pooled

Q = P / (P - 1)
generator = np.random.default_rng(5)
TWENTY = {
    "exponential": generator.exponential(size=20),
    "heavy-tailed": generator.exponential(size=20) ** 4,
    "with ties": np.repeat([0.2, 1.0, 3.0, 3.5], 5),
    "all equal": np.full(20, 0.7),
    "95 % zeros": np.r_[3.0, np.zeros(19)],
    "three that count": np.r_[3.0, 2.0, 2.0, np.zeros(17)],
    "all zero": np.zeros(20),
    "huge": generator.exponential(size=20) * 1e200,
    "tiny": generator.exponential(size=20) * 1e-200,
}
FRACTIONS = [0.05, 0.1, 0.33, 0.5, 1.0]  # of 20 pixels: m = 1, 2, 6.6, 10, 20


def weights_of(losses, share=0.1, p=P):
    return pooling_weights(torch.as_tensor(losses), alone, p, share).numpy()


def bounds(n, m):
    """gamma and tau."""
    gamma = n ** (-1 / Q)
    return gamma, gamma * m ** (-1 / P)


def solved_by_scipy(losses, m):
    """The largest sum of w l, by sequential quadratic programming."""
    n = len(losses)
    gamma, tau = bounds(n, m)
    norm = {
        "type": "ineq",
        "fun": lambda w: gamma**P - (np.maximum(w, 0) ** P).sum(),
        "jac": lambda w: -P * np.maximum(w, 0) ** (P - 1),
    }
    found = minimize(
        lambda w: -w @ losses, np.full(n, 1 / n), jac=lambda w: -losses, method="SLSQP",
        bounds=[(0, tau)] * n, constraints=[norm], options={"maxiter": 2000, "ftol": 1e-15},
    )  # fmt: skip
    return -found.fun


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("kind", TWENTY)
def test_no_weights_within_the_bounds_give_a_larger_sum(kind, fraction):
    losses = TWENTY[kind]
    scale = losses.max() or 1.0  # the problem is homogeneous, and scipy's tolerances are not
    expected = solved_by_scipy(losses / scale, 20 * fraction) * scale
    found = weights_of(losses, fraction) @ losses
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("kind", TWENTY)
def test_the_weights_keep_their_bounds_and_use_them_up(kind, fraction):
    losses, m = TWENTY[kind], 20 * fraction
    weights = weights_of(losses, fraction)
    gamma, tau = bounds(20, m)
    norm = (weights**P).sum() ** (1 / P)
    assert weights.min() >= 0
    assert weights.max() <= tau * (1 + 1e-14)
    assert norm <= gamma * (1 + 1e-14)
    if np.count_nonzero(losses) >= m:
        assert norm == pytest.approx(gamma, rel=1e-13)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("kind", TWENTY)
def test_the_result_lies_between_the_mean_and_the_mean_of_the_largest(kind, fraction):
    losses, m = TWENTY[kind], 20 * fraction
    found = weights_of(losses, fraction) @ losses
    largest = np.sort(losses)[::-1][: int(m)]
    rest = (m - int(m)) * np.sort(losses)[::-1][min(int(m), 19)]
    assert losses.mean() * (1 - 1e-14) <= found <= (largest.sum() + rest) / m * (1 + 1e-14)


def test_with_m_equal_to_n_it_is_the_plain_mean():
    losses = np.random.default_rng(1).exponential(size=1000)
    np.testing.assert_allclose(weights_of(losses, 1.0), 1e-3, rtol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_losses_agrees_with_trying_every_set(seed):
    random = np.random.default_rng(seed)
    losses = random.exponential(size=int(random.integers(1, 400))) ** random.integers(1, 6)
    losses[random.random(len(losses)) < random.random()] = 0
    losses = np.round(losses, int(random.integers(1, 5)))  # and so with ties
    share = float(random.choice([0.1, 0.01, 0.37, 0.9, 1.0]))
    p = float(random.choice([1.05, 1.3, 2.0, 20.0]))
    expected = max_pooled(losses, p, share)
    assert weights_of(losses, share, p) @ losses == pytest.approx(expected, rel=1e-11, abs=1e-300)


def test_a_single_pixel_has_the_weight_one():
    # m = 0.1: the norm binds, the cap does not
    assert weights_of(np.array([2.5])) == pytest.approx([1.0], rel=1e-14)


def test_no_pixel_has_no_weight():
    assert weights_of(np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_makes_no_endless_search(bad):
    losses = np.array([1.0, bad, 2.0])
    assert not np.isfinite(weights_of(losses) @ losses)


@pytest.mark.parametrize("sizes", [[20, 0], [7, 13], [1, 2, 0, 17]])
@pytest.mark.parametrize("kind", TWENTY)
def test_ranks_that_share_the_pixels_find_the_same_weights(kind, sizes):
    losses = torch.as_tensor(TWENTY[kind])
    meeting = MeetingPoint(len(sizes))
    with ThreadPoolExecutor(len(sizes)) as ranks:
        parts = ranks.map(
            pooling_weights, losses.split(sizes), map(meeting.global_sum, range(len(sizes)))
        )
        found = torch.cat(list(parts))
    np.testing.assert_allclose(found, weights_of(losses), rtol=1e-13)
