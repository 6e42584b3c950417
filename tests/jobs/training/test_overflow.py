"""Numbers beyond the range of fp16: a forward pass is computed again, an update is skipped.

A CPU computes as a GPU does in mixed precision, with torch's own scaler and fused optimiser.
"""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from jobs import train as job
from jobs.models.build import build_backbone, normalise
from jobs.spec.counts_file import read_index
from jobs.train import features
from jobs.training import cell_trainer
from jobs.training.cell_trainer import CellTrainer
from jobs.training.job_run import Action, JobRun
from jobs.training.overflow import all_finite
from tests.jobs.cells import a_cell, a_share
from tests.jobs.ranks import on_ranks
from tests.jobs.small_runs import assert_same, grid_of, results, task_of
from tests.jobs.training.test_cell_trainer import (
    assert_equal_states,
    everything,
    trainee_of,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOTAL = 100  # steps
NONE = {"recomputed": 0, "last_recomputed": -1, "skipped": 0, "last_skipped": -1}


def use_fp16(patch):
    usual = torch.optim.SGD
    patch.setattr(torch.optim, "SGD", lambda *a, **k: usual(*a, **{**k, "fused": True}))
    patch.setattr(cell_trainer, "is_mixed", lambda protocol, _: protocol.precision == "mixed")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    use_fp16(monkeypatch)


def mixed(loss="WCE", **protocol):
    return a_cell(loss, precision="mixed", **protocol)


def share(step, factor=1.0, **ranks):
    inputs, batch, target = a_share(step, images=2, size=(960, 1, 2), **ranks)
    return factor * inputs, batch, target


def train(trainer, steps, total=TOTAL):
    return [trainer.step(*share(step), step, total) for step in steps]


class Poison(torch.autograd.Function):
    """A loss whose gradient is not a number."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@pytest.fixture
def poison(monkeypatch):
    """Give the losses of some steps gradients that are not finite."""
    usual = CellTrainer._loss

    def in_steps(steps):
        def loss(self, inputs, target, position, half):
            found = usual(self, inputs, target, position, half)
            return Poison.apply(found) if round(position * TOTAL) in steps else found

        monkeypatch.setattr(CellTrainer, "_loss", loss)

    return in_steps


# --- the forward pass of a head ---------------------------------------------------------------

HUGE = 1000.0  # features of this size fit into fp16, but not what `near_the_end` makes of them


def near_the_end(trainer):
    """Give a cell a first convolution with large weights; batch norm takes them back."""
    with torch.no_grad():
        next(trainer.network.parameters()).mul_(1000)
    return trainer


def test_a_forward_pass_beyond_fp16_is_that_of_fp32(alone):
    """It leaves no trace: the statistics of batch norm have seen the batch once."""
    trainer = near_the_end(trainee_of(mixed(), alone))
    exact = trainee_of(a_cell("WCE"), alone)
    train(trainer, range(2))
    exact.load({**copy.deepcopy(trainer.state()), "scaler": {}})
    inputs, batch, target = share(2, HUGE)
    value = trainer.step(inputs.half(), batch, target, 2, TOTAL)  # as the backbone gives them
    assert trainer.failure is None
    assert trainer.overflows == {**NONE, "recomputed": 1, "last_recomputed": 2}
    assert exact.step(inputs.half().float(), batch, target, 2, TOTAL) == value
    for part in ("network", "momentum"):
        assert_equal_states(trainer.state()[part], exact.state()[part])


def test_what_overflows_fp32_too_stops_the_cell(alone):
    trainer = trainee_of(mixed(), alone)
    train(trainer, range(2))
    before = weights(trainer)
    inputs, batch, target = share(2)
    inputs[0, 0, 0, 0] = float("inf")
    trainer.step(inputs, batch, target, 2, TOTAL)
    assert trainer.failure == "the loss was nan at step 2 of 100"
    assert torch.equal(weights(trainer), before)


def with_a_large_image(group):
    """Three steps; in the second, one image of the last rank leaves fp16."""
    with pytest.MonkeyPatch.context() as patch:
        use_fp16(patch)
        trainer = near_the_end(trainee_of(mixed(learning_rate=0.1), group))
        start = weights(trainer)
        for step in range(3):
            inputs, batch, target = share(step, rank=group.rank, world_size=group.world_size)
            if step == 1 and 1 in batch.positions:
                inputs[batch.positions.index(1)] *= HUGE
            trainer.step(inputs, batch, target, step, TOTAL)
        return {"start": start, "end": weights(trainer), **trainer.overflows}


def test_all_ranks_compute_it_again_if_one_must(alone, tmp_path):
    one, other = on_ranks(2, tmp_path, with_a_large_image)
    expected = with_a_large_image(alone)
    for name in (*NONE, "start", "end"):
        assert torch.equal(*(torch.as_tensor(rank[name]) for rank in (one, other))), name
    assert {name: one[name] for name in NONE} == {**NONE, "recomputed": 1, "last_recomputed": 1}
    moved = (expected["end"] - expected["start"]).norm()
    assert moved > 0 and (one["end"] - expected["end"]).norm() < 0.01 * moved


# --- gradients --------------------------------------------------------------------------------


def test_a_cell_without_finite_gradients_stops_after_17_updates(alone, poison):
    """From 65536 the scale is below 1 after 17 halves."""
    poison(range(TOTAL))
    trainer = trainee_of(mixed(), alone)
    before = weights(trainer)
    for step in range(17):
        trainer.step(*share(step), step, TOTAL)
        assert trainer.failure is None
    trainer.step(*share(17), 17, TOTAL)
    assert trainer.failure == (
        "gradients overflow fp16 even at a scale of 1 (17 updates were skipped, the last one at "
        'step 16); set precision = "fp32" in [protocol]'
    )
    assert torch.equal(weights(trainer), before)
    assert all(m.count_nonzero() == 0 for m in everything(trainer.state()["momentum"]).values())


def with_scale(trainer, scale):
    state = copy.deepcopy(trainer.state())
    state["scaler"]["scale"] = scale
    trainer.load(state)
    return trainer


def test_the_last_step_is_looked_at_too(alone, poison):
    poison(range(TOTAL))
    trainer = with_scale(trainee_of(mixed(), alone), 1.0)
    train(trainer, [TOTAL - 1])
    assert "(1 updates were skipped, the last one at step 99)" in trainer.failure


def test_a_checkpoint_whose_scale_had_fallen_to_zero_trains_no_more(alone):
    """A program that did not look at the scale could save one."""
    trainer = with_scale(trainee_of(mixed(), alone), 0.0)
    before = weights(trainer)
    train(trainer, [5])
    assert trainer.failure.startswith("gradients overflow fp16 even at a scale of 1")
    assert torch.equal(weights(trainer), before)


def test_a_cell_goes_on_after_skipped_updates_and_resumes_to_the_same_bits(alone, poison):
    poison({1, 2, 4})
    states = []
    through = trainee_of(mixed(), alone)
    for step in range(6):
        train(through, [step])
        states.append(copy.deepcopy(through.state()))
    assert through.failure is None
    assert through.overflows == {**NONE, "skipped": 3, "last_skipped": 4}
    for done, state in enumerate(states, 1):
        resumed = trainee_of(mixed(), alone)
        resumed.load(state)
        train(resumed, range(done, 6))
        assert_equal_states(resumed.state(), states[-1])
        assert resumed.overflows == through.overflows


def test_a_step_copies_once_to_the_host(alone, monkeypatch):
    """Each copy waits for all that was queued. A GPU copies in `tolist` and in `item`.

    DistributedDataParallel reads a factor in main memory for each gradient.
    """
    copies = []

    class Listed(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:  # item, float, bool
                copies.append("item")
            return func(*args, **(kwargs or {}))

    trainer = trainee_of(mixed(), alone)
    train(trainer, [0])
    usual = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: copies.append("tolist") or usual(x))
    with Listed():
        train(trainer, [1])
    assert copies == ["tolist", *("item" for _ in trainer.network.parameters())]


# --- the frozen backbone ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_features_beyond_fp16_are_those_of_fp32_and_statistics_move_once(alone, mode):
    cell = mixed(backbone_batchnorm=mode)
    backbone = build_backbone("mobilenet_v3_large", 0, 0.1).train(mode == "train")
    images = torch.randint(256, (2, 3, 24, 32), dtype=torch.uint8)
    assert features(backbone, images, cell, alone).dtype == torch.float16
    first = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        first.weight *= 1e6  # batch norm takes that back, if it is in train mode
    exact = copy.deepcopy(backbone)
    with torch.no_grad():
        expected = exact(normalise(images))
    with pytest.warns(RuntimeWarning, match="features overflow fp16"):
        found = features(backbone, images, cell, alone)
    assert torch.equal(found, expected) and found.isfinite().all()
    assert_equal_states(backbone.state_dict(), exact.state_dict())


def test_features_of_several_strides_and_ranks_are_looked_at_together(alone):
    fine, nan = torch.full((2, 3), 6e4).half(), torch.tensor([float("nan")]).half()
    both = torch.tensor([float("inf"), -float("inf")]).half()
    assert all_finite(fine, alone) and all_finite([fine, fine[:0]], alone)
    for bad in (nan, both, [fine, nan]):
        assert not all_finite(bad, alone)
    other = SimpleNamespace(sum=lambda mine: mine + float("inf"))  # another rank's
    assert not all_finite(fine, other)


# --- whole jobs -------------------------------------------------------------------------------

LOSSES = ("WCE", "DLNWCE")


@pytest.fixture
def accidents(monkeypatch):
    """Overflows of the second loss in five steps: forward in 0 and 4, of gradients in 2 and 3."""
    usual = CellTrainer._loss

    def loss(self, inputs, target, position, half):
        found, step = usual(self, inputs, target, position, half), round(position * 5)
        if self.cell.loss.name == LOSSES[1]:
            if step in (0, 4) and half is not None:
                return found * float("inf")
            if step in (2, 3):
                return Poison.apply(found)
        return found

    monkeypatch.setattr(CellTrainer, "_loss", loss)


def test_a_bundle_a_cell_alone_and_a_resumed_one_have_the_same_bits_and_history(
    streets, tmp_path, accidents, monkeypatch
):
    runs = {}
    for name, losses in {"bundle": LOSSES, "alone": LOSSES[1:], "stopped": LOSSES}.items():
        grid = grid_of(
            tmp_path / name, streets.folder, *losses, precision="mixed", workers=0, epochs=1
        )
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(
                    JobRun, "decide", mock.Mock(side_effect=[Action.GO_ON] * 3 + [Action.STOP])
                )
                assert job.main([str(task_of(grid))]) == 0
            assert results(grid.run) == {}
        assert job.main([str(task_of(grid))]) == 0
        (index,) = map(read_index, grid.run.counts.glob("*.json"))
        cells = [index.of_cell(signature) for signature in index.signatures]
        histories = {c["name"]: {k: c[k] for k in NONE} for c in cells}
        runs[name] = (results(grid.run), histories)
    (bundle, histories), (alone, of_alone), (stopped, of_stopped) = runs.values()
    (name,) = alone
    assert of_stopped == histories and of_alone == {name: histories[name]}
    assert histories[name] == {
        "recomputed": 2, "last_recomputed": 4, "skipped": 2, "last_skipped": 3,
    }  # fmt: skip
    assert_same(alone[name], bundle[name])
    for cell in bundle:
        assert_same(stopped[cell], bundle[cell])
