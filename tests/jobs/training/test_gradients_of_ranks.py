"""Several ranks add their gradients in one order, in a resumed run too, and a cell that fails
changes nothing for its neighbours."""

from __future__ import annotations

import copy

import pytest

from jobs.training import cell_trainer
from jobs.training.cell_trainer import CellTrainer
from tests.jobs.cells import CLASS_WEIGHTS, MODEL, a_cell, a_share
from tests.jobs.ranks import on_ranks
from tests.jobs.training.test_cell_trainer import assert_equal_states

DEEPLAB = "deeplabv3_mobilenet_v3_large"
STEPS = 3


def trainers_of(group, *cells):
    cells = [a_cell(loss, model, learning_rate=0.1) for loss, model in cells]
    return [CellTrainer(cell, 3, CLASS_WEIGHTS, group) for cell in cells]


def train(group, trainers, steps):
    """Train each cell that has not failed, and return the states of all."""
    for step in steps:
        share = a_share(step, group.rank, group.world_size)
        for trainer in trainers:
            if trainer.failure is None:
                trainer.step(*share, step, STEPS)
    return [trainer.state() for trainer in trainers]


def run_through_and_resumed(group, model):
    """Return the state of a cell that was trained in one go, and of one resumed at each step."""
    (through,) = trainers_of(group, ("WDLWCE", model))
    for step in range(STEPS):
        (resumed,) = trainers_of(group, ("WDLWCE", model))
        resumed.load(copy.deepcopy(through.state()))
        train(group, [through], [step])
        train(group, [resumed], [step])
        assert_equal_states(resumed.state(), through.state())
    return through.state()


@pytest.mark.parametrize("model", [MODEL, pytest.param(DEEPLAB, marks=pytest.mark.slow)])
def test_a_resumed_cell_adds_gradients_in_the_same_order(tmp_path, model):
    """The order of three addends depends on their place in a bucket; two have only one order."""
    first, *others = on_ranks(3, tmp_path, run_through_and_resumed, model)
    for other in others:
        assert_equal_states(other, first)


def beside_one_that_fails(group):
    """Return the states of two cells, alone and around one whose second loss is not finite."""
    first, last = ("WCE", MODEL), ("WDLNWCE", MODEL)
    honest = cell_trainer.combined_loss

    def broken(logits, target, loss, position, *rest):
        value = honest(logits, target, loss, position, *rest)
        return value * float("nan") if loss.name == "FL" and position > 0 else value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_trainer, "combined_loss", broken)
        alone = train(group, trainers_of(group, first, last), range(STEPS))
        trainers = trainers_of(group, first, ("FL", MODEL), last)
        beside = train(group, trainers, range(STEPS))
    return alone, beside, trainers[1].failure


def test_a_cell_that_fails_changes_nothing_for_its_neighbours(tmp_path):
    for alone, beside, failure in on_ranks(2, tmp_path, beside_one_that_fails):
        assert failure == "the loss was nan at step 1 of 3"
        for state, expected in zip(beside[::2], alone, strict=True):
            assert_equal_states(state, expected)
