"""DeepLabV3's dilated convolutions on a CPU: torch's numbers without the products of padding,
and the same promises as any other layer of a head."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from jobs import train as job
from jobs.models import dilated
from jobs.models.build import build_head
from jobs.models.dilated import DilatedConv2d, gradient_of_kernel, replace_dilated
from jobs.models.memory_format import by_pixel
from jobs.spec.counts_file import read_index
from jobs.training import job_run
from tests.jobs.cells import a_cell, a_share
from tests.jobs.ranks import on_ranks
from tests.jobs.small_runs import grid_of, task_of
from tests.jobs.training.test_cell_trainer import TOTAL, assert_equal_states, trainee_of, weights

DEEPLAB = "deeplabv3_mobilenet_v3_large"
RATES = (12, 24, 36)


@pytest.fixture
def also_small(monkeypatch):
    """Maps of any size take the way of large ones."""
    monkeypatch.setattr(dilated, "LARGE", 0)


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype)


# --- torch's numbers --------------------------------------------------------------------------

# smaller than the dilation, as large, between one and two times, exactly two, and larger
SIZES = [(3, 4), (4, 4), (6, 7), (8, 8), (15, 9), (1, 21)]


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_gradients_are_those_of_torchs_convolution(height, width, images):
    x, kernel = draw(images, 6, height, width), draw(5, 6, 3, 3)
    above = draw(images, 5, height, width)
    theirs = [tensor.clone().requires_grad_() for tensor in (x, kernel)]
    expected = functional.conv2d(*theirs, padding=4, dilation=4)
    expected.backward(above)
    ours = [tensor.clone().requires_grad_() for tensor in (x, kernel)]
    result = dilated._Convolve.apply(by_pixel(ours[0]), ours[1], 4)
    assert result.is_contiguous()
    result.backward(above)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_a_head_is_torchvisions_with_the_same_state(also_small, training):
    torch.manual_seed(0)
    theirs, ours = DeepLabHead(16, 4), DeepLabHead(16, 4)
    ours.load_state_dict(theirs.state_dict())
    replace_dilated(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, found = draw(2, 16, 14, 40, dtype=torch.float32), []
    for head in (theirs, ours):
        torch.manual_seed(1)  # of dropout
        head.train(training)
        result = head(x)
        result.square().sum().backward()
        found.append([result.detach(), *(parameter.grad for parameter in head.parameters())])
    for expected, result in zip(*found, strict=True):
        assert (result - expected).norm() <= 1e-4 * expected.norm() + 1e-6


# --- no products of padding -------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.overloadpacket.__name__:
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def reads_within(size, dilation):
    """Count one by one how often the taps along an axis read a pixel of the map."""
    places = itertools.product(range(size), (-dilation, 0, dilation))
    return sum(0 <= place + by < size for place, by in places)


@pytest.mark.parametrize("dilation", RATES)
@pytest.mark.parametrize("height, width", [(60, 60), (65, 87), (30, 40), (10, 12)])
def test_only_what_lies_within_the_map_is_multiplied(dilation, height, width):
    x, above = draw(2, 3, height, width), draw(2, 2, height, width)
    with Products() as products:
        gradient_of_kernel(x, above, dilation)
    within = reads_within(height, dilation) * reads_within(width, dilation)
    assert products.count == 2 * 3 * 2 * within
    if height == 60:
        share = {12: 0.75, 24: 0.54, 36: 0.36}[dilation]
        assert within / (9 * 60 * 60) == pytest.approx(share, abs=0.005)


# --- where ------------------------------------------------------------------------------------


def way_of(x):
    convolution = DilatedConv2d(x.shape[1], 2, 3, padding=12, dilation=12, bias=False)
    return type(convolution.to(x.dtype)(x).grad_fn).__name__


def test_large_features_in_single_precision_take_this_way_and_others_torchs():
    large, ours, torchs = (50, 100, 100), "_ConvolveBackward", "ConvolutionBackward0"
    assert way_of(torch.zeros(1, *large)) == way_of(torch.zeros(2, *large)) == ours
    assert way_of(torch.zeros(0, *large)) == ours  # a rank without an image
    assert way_of(torch.zeros(64, 50, 99, 100)) == torchs  # as large an image, however many
    assert way_of(torch.zeros(1, *large, dtype=torch.float64)) == torchs
    with torch.autocast("cpu", torch.bfloat16):
        assert way_of(torch.zeros(1, *large)) == torchs
    with torch.device("meta"):  # as on any other device
        assert way_of(torch.zeros(1, *large)) == torchs


def test_of_a_deeplab_just_the_three_dilated_convolutions_take_it():
    head = build_head("deeplabv3_resnet50", 3, 0, 0.1)
    found = [module for module in head.modules() if isinstance(module, DilatedConv2d)]
    assert [convolution.dilation[0] for convolution in found] == list(RATES)
    others = [module for module in head.modules() if type(module) is nn.Conv2d]
    assert {convolution.dilation for convolution in others} == {(1, 1)} and len(others) == 5


def test_features_are_laid_out_once_for_the_three(also_small, monkeypatch):
    copies, honest = [], dilated.by_pixel

    def counted(images):
        result = honest(images)
        copies.append(result.data_ptr() != images.data_ptr())
        return result

    monkeypatch.setattr(dilated, "by_pixel", counted)
    head = build_head(DEEPLAB, 3, 0, 0.1).eval()
    head(draw(1, 960, 6, 7, dtype=torch.float32))
    assert copies == [True, False, False, False]


# --- the promises -----------------------------------------------------------------------------

WIDE = (960, 3, 38)  # features of an image: some taps of every rate reach within it


def steps_of(trainers, steps=2):
    for step in range(steps):
        inputs, batch, target = a_share(step, images=2, size=WIDE)
        for trainer in trainers:
            trainer.step(inputs, batch, target, step, TOTAL)
    return [trainer.state() for trainer in trainers]


def test_a_cell_has_the_same_bits_alone_and_in_a_bundle(alone, also_small):
    cells = [a_cell(loss, DEEPLAB) for loss in ("WCE", "DL", "FL")]
    bundle = steps_of([trainee_of(cell, alone) for cell in cells])
    assert torch.is_grad_enabled() and len({str(state["network"]) for state in bundle}) == 3
    for cell, state in zip(cells, bundle, strict=True):
        assert_equal_states(steps_of([trainee_of(cell, alone)])[0], state)


def trained_on(group):
    """Return the change of the weights by two steps, in double precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dilated, "_is_worth_it", lambda x: True)
        torch.set_default_dtype(torch.float64)
        try:
            trainer = trainee_of(a_cell("WDLWCE", DEEPLAB, learning_rate=0.1), group)
            start = weights(trainer)
            for step in range(2):
                share = a_share(step, group.rank, group.world_size, images=2, size=WIDE)
                trainer.step(*share, step, TOTAL)
            return weights(trainer) - start
        finally:
            torch.set_default_dtype(torch.float32)


def test_ranks_change_nothing_but_rounding(alone, tmp_path):
    """Two with an image each, and one without."""
    expected = trained_on(alone)
    (folder := tmp_path / "ranks").mkdir()
    for update in on_ranks(3, folder, trained_on):
        assert (update - expected).norm() <= 1e-10 * expected.norm()


def test_a_cell_that_a_program_with_other_rounding_began_is_marked(streets, tmp_path, monkeypatch):
    """As after other threads: what it is resumed with is on record, and no other cell's."""
    grid = grid_of(tmp_path, streets.folder, "CE")
    with monkeypatch.context() as older:
        older.setattr(job_run, "ROUNDING", {"cpu": job_run.ROUNDING["cpu"] - 1})
        older.setattr(job_run.JobRun, "decide", lambda job: job_run.Action.STOP)
        assert job.main([str(task_of(grid))]) == 0
    assert job.main([str(task_of(grid))]) == 0
    (path,) = grid.run.counts.glob("*.json")
    before, after = read_index(path).record["provenance"]
    assert {key for key in before if before[key] != after[key]} == {"rounding"}
