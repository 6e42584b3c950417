"""One cell in training: what a step does, what stops it, and what of it is saved."""

import copy
import io
import platform

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from hpc.distributed.allocator import keep_freed_memory
from jobs.models.build import Backbone, build_backbone, build_head
from jobs.models.dropout import set_dropout_position
from jobs.training.cell_trainer import CellTrainer, learning_rate, sgd
from tests.jobs.cells import CLASS_WEIGHTS, VOID, a_cell, a_share
from tests.jobs.ranks import on_ranks

TOTAL = 10  # steps


def trainee_of(cell, group, backbone=None):
    return CellTrainer(cell, 3, CLASS_WEIGHTS, group, backbone)


def train(trainer, steps):
    return [trainer.step(*a_share(step), step, TOTAL) for step in steps]


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.network.parameters()])


def everything(state):
    """All tensors of a state, copied, by their names in it."""
    if isinstance(state, torch.Tensor):
        return {"": state.clone()}
    if not isinstance(state, dict):
        return {"": torch.tensor(state)}
    return {f"{k}/{rest}": t for k, v in state.items() for rest, t in everything(v).items()}


def assert_equal_states(one, other):
    one, other = everything(one), everything(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_step_is_torchs_sgd_on_torchs_cross_entropy(alone):
    """Three steps by hand: the same head, batch norm and dropout, the rest as torch has it."""
    cell = a_cell("WCE", learning_rate=0.1, weight_decay=0.01)
    head = build_head(cell.model, 3, cell.seed, cell.protocol.batchnorm_momentum).train()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    criterion = nn.CrossEntropyLoss(torch.tensor(CLASS_WEIGHTS).float(), ignore_index=VOID)
    expected = []
    for step in range(3):
        inputs, batch, target = a_share(step)
        set_dropout_position(head, cell.seed, cell.model, step, batch.positions)
        logits = functional.interpolate(head(inputs), (24, 32), mode="bilinear")
        loss = criterion(logits, target)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / TOTAL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    trainer = trainee_of(cell, alone)
    start = weights(trainer)
    assert train(trainer, range(3)) == pytest.approx(expected, rel=1e-5)
    by_hand = torch.cat([parameter.detach().flatten() for parameter in head.parameters()])
    assert (weights(trainer) - by_hand).norm() < 1e-5 * (by_hand - start).norm()


def test_gradients_lie_where_they_lay_in_the_step_before(alone):
    trainer = trainee_of(a_cell(), alone)
    train(trainer, [0])
    # held here, so that the next ones cannot lie there by chance
    first = [parameter.grad for parameter in trainer.network.parameters()]
    train(trainer, [1])
    second = [parameter.grad for parameter in trainer.network.parameters()]
    assert [g.data_ptr() for g in second] == [g.data_ptr() for g in first]


def test_where_gradients_lie_changes_no_bit(alone, monkeypatch):
    in_buckets = trainee_of(a_cell("WDLWCE"), alone)

    def apart(network, **options):
        return DistributedDataParallel(network, **{**options, "gradient_as_bucket_view": False})

    monkeypatch.setattr("jobs.training.cell_trainer.DistributedDataParallel", apart)
    on_their_own = trainee_of(a_cell("WDLWCE"), alone)
    assert train(in_buckets, range(3)) == train(on_their_own, range(3))
    assert_equal_states(in_buckets.state(), on_their_own.state())


def after_three_steps(group, keeps_memory):
    assert not keeps_memory or keep_freed_memory()
    trainer = trainee_of(a_cell("WDLWCE"), group)
    train(trainer, range(3))
    return trainer.state()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_is_kept_changes_no_bit(tmp_path):
    states = []
    for keeps_memory in (False, True):
        folder = tmp_path / str(keeps_memory)
        folder.mkdir()
        states += on_ranks(1, folder, after_three_steps, keeps_memory)
    assert_equal_states(*states)


def test_cells_that_differ_in_their_loss_start_from_the_same_weights(alone):
    one, other = (trainee_of(a_cell(loss), alone) for loss in ("WCE", "WDLNCE"))
    assert_equal_states(one.network.state_dict(), other.network.state_dict())
    train(one, [0]), train(other, [0])
    assert not torch.equal(weights(one), weights(other))


def test_the_schedule_follows_the_step(alone):
    """Of ten steps the naive ramp ends at step 9: a dice at first, then the cross entropy."""
    for scheduled, single, step in (("DLNCE", "DL", 0), ("DLNCE", "CE", 9), ("DLACE", "CE", 0)):
        values = [train(trainee_of(a_cell(loss), alone), [step]) for loss in (scheduled, single)]
        assert values[0] == values[1]


@pytest.fixture
def fused(monkeypatch):
    """The optimiser of a GPU, whose kernel torch has for a CPU too."""
    usual = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: usual(*a, **{**k, "fused": True}))


def test_on_a_gpu_one_kernel_updates_all_weights():
    protocol = a_cell().protocol
    assert sgd(nn.Conv2d(2, 3, 1), protocol).defaults["fused"] is False
    with FakeTensorMode(), torch.device("cuda"):  # a device without memory
        assert sgd(nn.Conv2d(2, 3, 1), protocol).defaults["fused"] is True


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_that_kernel_updates_as_sgd_does_also_after_a_resume(alone, request, momentum):
    cell = a_cell("WDLACE", learning_rate=0.1, weight_decay=0.01, momentum=momentum)
    usual = trainee_of(cell, alone)
    start = weights(usual)
    train(usual, range(4))
    request.getfixturevalue("fused")
    through, resumed = trainee_of(cell, alone), trainee_of(cell, alone)
    train(through, range(2))
    resumed.load(copy.deepcopy(through.state()))
    assert train(through, range(2, 4)) == train(resumed, range(2, 4))
    assert_equal_states(resumed.state(), through.state())
    assert through._optimizer.defaults["fused"]
    assert (weights(through) - weights(usual)).norm() < 1e-6 * (weights(usual) - start).norm()


@pytest.mark.parametrize("step", range(TOTAL))
def test_the_learning_rate_falls_to_zero(step):
    linear = a_cell(learning_rate=0.02).protocol
    assert learning_rate(linear, step, TOTAL) == pytest.approx(0.02 * (TOTAL - step) / TOTAL)
    published = a_cell(learning_rate=0.02, decay="polynomial").protocol
    expected = 0.02 * ((TOTAL - step) / TOTAL) ** 0.9
    assert learning_rate(published, step, TOTAL) == pytest.approx(expected)


# --- failure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_stops_the_cell_and_moves_no_weight(alone, junk):
    trainer = trainee_of(a_cell(), alone)
    train(trainer, range(2))
    before, momentum = weights(trainer), everything(trainer.state()["momentum"])
    inputs, batch, target = a_share(2)
    inputs[0, 0, 0, 0] = junk
    trainer.step(inputs, batch, target, 2, TOTAL)
    assert trainer.failure == "the loss was nan at step 2 of 10"
    assert torch.equal(weights(trainer), before)
    after = everything(trainer.state()["momentum"])
    assert all(torch.equal(after[name], momentum[name]) for name in momentum)


def test_a_batch_without_a_label_is_no_failure(alone):
    trainer = trainee_of(a_cell("WDLWCE"), alone)
    assert trainer.step(*a_share(0, void=range(5)), 0, TOTAL) == pytest.approx(-0.5, abs=1e-4)
    assert trainer.failure is None


# --- what is saved ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["WCE", "WDLACE"])
def test_a_cell_that_was_saved_goes_on_to_the_same_bits(alone, loss):
    through = trainee_of(a_cell(loss), alone)
    train(through, range(2))
    file = io.BytesIO()
    torch.save(through.state(), file)
    values = train(through, range(2, 4))

    resumed = trainee_of(a_cell(loss), alone)
    file.seek(0)
    resumed.load(torch.load(file, weights_only=True))
    assert train(resumed, range(2, 4)) == values
    assert_equal_states(resumed.state(), through.state())


def test_the_learning_rate_is_not_part_of_the_state(alone):
    """It is a function of the step: a saved cell may go on under another number of epochs."""
    trainer = trainee_of(a_cell(), alone)
    train(trainer, [0])
    assert {name.split("/")[0] for name in everything(trainer.state())} == {"network", "momentum"}
    assert trainer.state()["momentum"][0].keys() == {"momentum_buffer"}


# --- the whole network ------------------------------------------------------------------------


def test_the_whole_network_trains_from_images(alone):
    backbone = build_backbone("mobilenet_v3_large", 0, 0.1)
    assert isinstance(backbone, Backbone)
    before = copy.deepcopy(backbone.state_dict())
    trainer = trainee_of(a_cell(train="all", learning_rate=0.1), alone, backbone)
    images = torch.randn(5, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    _, batch, target = a_share(0)
    trainer.step(images, batch, target, 0, TOTAL)
    after = trainer.network.backbone.state_dict()
    still = [name for name in after if torch.equal(after[name], before[name])]
    assert still == []
