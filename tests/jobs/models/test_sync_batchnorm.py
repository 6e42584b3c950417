"""Batch norm is torch's on one rank, and the same on the shares of many."""

import copy

import pytest
import torch
from torch import nn

from jobs.models.sync_batchnorm import BatchNorm2d, replace_batchnorm
from tests.jobs.ranks import on_ranks

CHANNELS = 5


def torchs_layer():
    """A batch norm of torch whose parameters and running statistics are not the first ones."""
    layer = nn.BatchNorm2d(CHANNELS, momentum=0.07, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.copy_(torch.randn(CHANNELS, generator=generator))
        layer.running_var.copy_(torch.rand(CHANNELS, generator=generator))
    return layer


def our_layer(group=None):
    layer = nn.Sequential(torchs_layer())
    replace_batchnorm(layer, momentum=0.07, group=group)
    assert type(layer[0]) is BatchNorm2d
    return layer[0]


def images(number, size=(3, 4), seed=1, mean=2.0):
    """Noise of spread 1 around means from 0 to `mean`, one a channel."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, CHANNELS, *size, generator=generator, dtype=torch.float64)
    return noise + torch.linspace(0, mean, CHANNELS, dtype=torch.float64)[:, None, None]


def passed(layer, inputs):
    """Output, all gradients, and the state after one pass forward and back."""
    inputs = inputs.clone().requires_grad_()
    output = layer(inputs)
    pull = torch.randn(
        output.shape[1:], generator=torch.Generator().manual_seed(2), dtype=inputs.dtype
    )
    (output.sin() * pull).sum().backward()
    found = {"output": output.detach(), "inputs": inputs.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return found | {f"buffer {name}": buffer for name, buffer in layer.named_buffers()}


def assert_close(found, expected, bound=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name] - value).double().norm()
        assert difference <= bound * value.double().norm(), name


@pytest.mark.parametrize("number", [1, 2, 7])
def test_training_is_that_of_torch(number):
    inputs = images(number)
    assert_close(passed(our_layer(), inputs), passed(torchs_layer(), inputs))


def test_a_spread_that_is_small_beside_the_mean_is_exact():
    """With means of 1e6, a difference of sums of squares would lose twelve of sixteen digits."""
    far, near = images(4, mean=1e6), images(4, mean=0.0)
    layer, expected = our_layer(), torchs_layer()
    layer(far), expected(near)
    torch.testing.assert_close(layer.running_var, expected.running_var, rtol=1e-9, atol=0)


@pytest.mark.parametrize("number", [1, 3])
def test_evaluation_is_that_of_torch_and_moves_nothing(number):
    ours, theirs = our_layer().eval(), torchs_layer().eval()
    before = copy.deepcopy(ours.state_dict())
    assert_close(passed(ours, images(number)), passed(theirs, images(number)))
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in before.items())


def test_running_statistics_follow_those_of_torch_over_many_steps():
    ours, theirs = our_layer(), torchs_layer()
    for seed in range(20):
        inputs = images(2, seed=seed)
        ours(inputs), theirs(inputs)
    assert_close(ours.state_dict(), theirs.state_dict())
    assert ours.num_batches_tracked == 20


def test_one_image_of_one_pixel_is_normalised_to_the_bias():
    """DeepLabV3's pooling branch at one image a job, where torch's layer refuses."""
    pixel = images(1, size=(1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torchs_layer()(pixel)
    layer = our_layer()
    before = layer.running_var.clone()
    found = passed(layer, pixel)
    torch.testing.assert_close(found["output"].flatten(), layer.bias.detach())
    assert not found["inputs"].any() and torch.isfinite(layer.running_var).all()
    torch.testing.assert_close(layer.running_var, 0.93 * before)


def test_gradients_pass_gradcheck():
    layer = our_layer()
    inputs = images(2, size=(2, 2)).requires_grad_()

    def normalised(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(normalised, (inputs, layer.weight, layer.bias))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(half):
    """40 000 pixels of 30: their sum is beyond half precision."""
    layer = BatchNorm2d(1)
    inputs = torch.full((1, 1, 200, 200), 30.0, dtype=half)
    inputs[..., 1::2] = 32.0
    output = layer(inputs)
    assert output.dtype == half
    assert layer.running_mean.item() == pytest.approx(3.1, rel=1e-6)
    torch.testing.assert_close(output[0, 0, 0, :2].float(), torch.tensor([-1.0, 1.0]))


def test_names_and_shapes_of_the_state_are_those_of_torch():
    ours, theirs = our_layer().state_dict(), torchs_layer().state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


def test_every_layer_of_a_network_is_replaced_and_keeps_its_state():
    network = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.Sequential(torchs_layer(), nn.ReLU()))
    before = copy.deepcopy(network.state_dict())
    replace_batchnorm(network, momentum=0.3)
    layer = network[1][0]
    assert isinstance(layer, BatchNorm2d) and layer.momentum == 0.3
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


# --- many ranks -------------------------------------------------------------------------------

SHARES = {2: [(3, 5), (0, 4), (7, 1), (1, 0)], 4: [(2, 0, 3, 1), (1, 1, 1, 1), (0, 0, 0, 2)]}


def on_its_share(group, shares):
    """Return the results of each rank for each batch, which `shares` splits over the ranks."""
    found = []
    for sizes in shares:
        mine = images(sum(sizes)).split(sizes)[group.rank]
        found.append(passed(our_layer(group.process_group), mine))
    return found


@pytest.fixture(scope="module", params=SHARES)
def ranks(request, tmp_path_factory):
    """The shares of a number of ranks, and what the ranks found."""
    shares = SHARES[request.param]
    return shares, on_ranks(request.param, tmp_path_factory.mktemp("ranks"), on_its_share, shares)


def test_the_shares_of_many_ranks_are_normalised_like_the_whole_batch(ranks):
    for number, sizes in enumerate(ranks[0]):
        parts = [found[number] for found in ranks[1]]
        expected = passed(our_layer(), images(sum(sizes)))
        for name in ("output", "inputs"):
            whole = torch.cat([part[name] for part in parts])
            assert_close({name: whole}, {name: expected[name]})
        for name in ("weight", "bias"):  # ranks hold parts, which the optimiser's sum completes
            whole = sum(part[name] for part in parts)
            assert_close({name: whole}, {name: expected[name]})


def test_all_ranks_keep_the_running_statistics_of_the_whole_batch(ranks):
    for number, sizes in enumerate(ranks[0]):
        expected = passed(torchs_layer(), images(sum(sizes)))
        for part in (found[number] for found in ranks[1]):
            for name in ("buffer running_mean", "buffer running_var"):
                assert_close({name: part[name]}, {name: expected[name]})
                assert torch.equal(part[name], ranks[1][0][number][name])  # to the last bit


def test_means_of_the_ranks_own_statistics_would_be_others(ranks):
    for sizes in ranks[0]:
        if min(sizes) > 0:
            whole = passed(our_layer(), images(sum(sizes)))["output"]
            shares = images(sum(sizes)).split(sizes)
            own = torch.cat([passed(our_layer(), share)["output"] for share in shares])
            assert (own - whole).norm() > 0.05 * whole.norm()
