"""The same element drops wherever its image is computed, and otherwise at random."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from jobs.models import dropout
from jobs.models.dropout import (
    PositionalDropout,
    random_bits,
    replace_dropout,
    set_dropout_position,
)

SIZE = (16, 9, 11)  # channels, height, width of an image's features


def a_network(rate=0.1):
    """Two dropout layers, one of them inside another module."""
    network = nn.Sequential(nn.Dropout(rate), nn.Sequential(nn.Dropout(rate)))
    replace_dropout(network)
    return network


def masks(positions, seed=0, model="fcn_resnet50", step=3, rate=0.1, layer=0, size=SIZE):
    """True where an element of the images at these positions is kept."""
    network = a_network(rate)
    set_dropout_position(network, seed, model, step, positions)
    chosen = [network[0], network[1][0]][layer]
    return chosen(torch.ones(len(positions), *size)) != 0


def test_the_mask_does_not_depend_on_how_the_batch_is_split():
    whole = masks(range(7))
    for shares in ([range(3), range(3, 7)], [range(1), range(1, 1), range(1, 7)]):
        assert torch.equal(torch.cat([masks(share) for share in shares]), whole)
    assert torch.equal(masks([5, 0, 2]), whole[[5, 0, 2]])


def test_the_mask_does_not_depend_on_torchs_random_state_or_move_it():
    torch.manual_seed(1)
    first, state = masks(range(2)), torch.random.get_rng_state()
    torch.rand(100)
    assert torch.equal(masks(range(2)), first)
    torch.manual_seed(1)
    masks(range(2))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"model": "deeplabv3_resnet50"}, {"step": 4}, {"layer": 1}, {"positions": [12]}],
    ids=lambda other: next(iter(other)),
)
def test_seed_model_step_position_and_layer_each_draw_another_independent_mask(other):
    """Of two independent masks, 0.1 and 0.1, 2 x 0.1 x 0.9 of the elements differ."""
    size = (64, 30, 40)
    here = {"positions": [2], "size": size}
    differ = (masks(**here) ^ masks(**{**here, **other})).double()
    deviation = (0.18 * 0.82 / differ.numel()) ** 0.5
    assert abs(float(differ.mean()) - 0.18) < 4 * deviation


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_elements_drop_at_the_rate(rate):
    kept = masks(range(3), rate=rate, size=(64, 40, 50)).double()
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - rate)) < 4 * deviation


def test_heads_of_a_kind_share_the_mask_of_a_step(monkeypatch):
    """Each kind has its own, and takes turns with the other; the next step draws both anew."""
    drawn, honest = [], dropout.random_bits
    monkeypatch.setattr(
        dropout, "random_bits", lambda keys, count: drawn.append(keys) or honest(keys, count)
    )
    dropout._shared_mask.cache_clear()
    heads = {model: [nn.Dropout(0.5) for _ in range(3)] for model in ("fcn", "deeplabv3")}
    for step in (1, 2):
        found = {model: [] for model in heads}
        for model, head in [(m, layers[i]) for i in range(3) for m, layers in heads.items()]:
            replace_dropout(head)
            set_dropout_position(head, 0, model, step, range(2))
            found[model].append(head(torch.ones(2, *SIZE)))
        for first, *others in found.values():
            assert all(torch.equal(first, other) for other in others)
        assert not torch.equal(found["fcn"][0], found["deeplabv3"][0])
        assert len(drawn) == 2 * step


def test_kept_elements_are_scaled_and_dropped_ones_are_zero():
    network = a_network(0.2)
    set_dropout_position(network, 0, "fcn_resnet50", 0, range(2))
    inputs = torch.randn(2, *SIZE, dtype=torch.float64, requires_grad=True)
    output = network[0](inputs)
    output.sum().backward()
    kept = output != 0
    torch.testing.assert_close(output[kept], inputs[kept] / 0.8)
    torch.testing.assert_close(inputs.grad, kept.double() / 0.8)
    assert 0.7 < kept.double().mean() < 0.9


def test_an_infinite_feature_that_is_dropped_is_gone():
    kept = masks(range(1))
    inputs = torch.where(kept, 1.0, float("inf"))
    network = a_network()
    set_dropout_position(network, 0, "fcn_resnet50", 3, range(1))
    assert torch.equal(network[0](inputs), kept / 0.9)


def test_evaluation_changes_nothing_and_needs_no_position():
    inputs = torch.randn(2, *SIZE)
    assert torch.equal(a_network(0.5).eval()(inputs), inputs)
    assert torch.equal(a_network(0.0)(inputs), inputs)


def test_a_rank_without_an_image():
    network = a_network()
    set_dropout_position(network, 0, "fcn_resnet50", 0, range(3, 3))
    assert network(torch.ones(0, *SIZE)).shape == (0, *SIZE)


def test_every_layer_of_a_network_is_replaced():
    network = a_network(0.3)
    assert [type(m) for m in (network[0], network[1][0])] == [PositionalDropout] * 2
    assert network[1][0].p == 0.3


# --- the bits themselves ----------------------------------------------------------------------

KEYS = np.random.default_rng(0).integers(0, 2**32, (4, 2))
COUNT = 1 << 18


@pytest.fixture(scope="module")
def bits():
    """262 144 bits of each of four images, and of two whose keys differ in one bit."""
    keys = np.concatenate([KEYS, KEYS[:1] ^ [1, 0], KEYS[:1] ^ [0, 1 << 31]])
    drawn = random_bits(torch.from_numpy(keys), COUNT).numpy()
    assert drawn.min() >= 0 and drawn.max() < 2**32
    return drawn


def chi_square(cells):
    """The probability of counts as uneven as these if all cells are equally likely."""
    return stats.chisquare(cells.ravel()).pvalue


def test_bits_are_uniform(bits):
    for row in bits:
        for shift in range(0, 32, 8):
            assert chi_square(np.bincount(row >> shift & 255, minlength=256)) > 1e-4


def test_no_single_bit_leans_to_a_side(bits):
    ones = (bits[:, :, None] >> np.arange(32) & 1).sum(1)
    assert np.abs(ones - COUNT / 2).max() < 4.5 * (COUNT / 4) ** 0.5


@pytest.mark.parametrize("apart", [1, 2, 3, 16, 40, 256, 1600, 4096])
def test_elements_near_each_other_are_independent(bits, apart):
    """Neighbours in a row, in a column and in the next channel."""
    for row in bits[:4]:
        high = row >> 28
        pairs = 16 * high[:-apart] + high[apart:]
        assert chi_square(np.bincount(pairs, minlength=256)) > 1e-4


@pytest.mark.parametrize(("one", "other"), [(0, 1), (2, 3), (0, 4), (0, 5), (4, 5)])
def test_images_are_independent_even_if_their_keys_differ_in_one_bit(bits, one, other):
    pairs = 16 * (bits[one] >> 28) + (bits[other] >> 28)
    assert chi_square(np.bincount(pairs, minlength=256)) > 1e-4
