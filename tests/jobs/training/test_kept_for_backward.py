"""A backward pass keeps little memory.

A loss keeps the scores of all pixels once, and maps of pixels. A bundle keeps the activations of
one head.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from jobs.losses import functional
from jobs.losses.functional import combined_loss, sum_of_powers
from jobs.losses.grammar import parse_loss
from jobs.models.build import upsample
from jobs.training import cell_trainer as cell_trainer
from jobs.training.cell_trainer import CellTrainer
from tests.jobs.cells import CLASS_WEIGHTS, a_cell, a_share
from tests.jobs.losses.test_losses import PAIRS, SINGLE
from tests.jobs.oracles import VOID, a_batch

CLASSES = 48  # so many that a map of pixels is small beside the scores of all classes


def value_of(name, logits, target):
    weights = torch.linspace(0.5, 1.5, logits.shape[1], dtype=torch.float64)
    return combined_loss(logits, target, parse_loss(name), 0.6, weights, VOID)


def kept_bytes(work):
    """Bytes of all memory that `work()` leaves with autograd, each counted once."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = work()
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", [*SINGLE, *PAIRS])
def test_a_loss_keeps_the_scores_of_all_pixels_once(name):
    logits, target = a_batch(20, num_classes=CLASSES, size=(40, 40), dtype=torch.float32)
    logits.requires_grad_()
    kept = kept_bytes(lambda: value_of(name, logits, target))
    scores = logits.numel() * logits.element_size()
    assert scores <= kept < 1.6 * scores


def test_what_would_keep_them_twice_is_noticed():
    logits, _ = a_batch(20, num_classes=CLASSES, size=(40, 40), dtype=torch.float32)
    logits.requires_grad_()
    kept = kept_bytes(lambda: torch.log_softmax(logits, dim=1).exp().sum())
    assert kept >= 2 * logits.numel() * logits.element_size()


def test_the_logits_themselves_are_gone_once_their_scores_are_there(monkeypatch):
    logits, target = a_batch(21)
    logits.requires_grad_()
    seen = {}

    def watched(log_probs, *rest):
        seen["gone"] = seen["logits"]() is None
        return log_probs.sum()

    def made():
        large = logits * 1.0
        seen["logits"] = weakref.ref(large)
        return large

    monkeypatch.setitem(functional.LOSSES, "CE", watched)
    combined_loss(made(), target, parse_loss("CE"), 0.0, torch.ones(4), VOID)
    assert seen["gone"]


@pytest.mark.parametrize("of_true_class", [False, True])
@pytest.mark.parametrize("power", [1, 2])
def test_sums_of_powers_are_those_of_plain_torch(power, of_true_class):
    logits, target = a_batch(22)
    where = (target != VOID).unsqueeze(1)
    if of_true_class:
        where = target.unsqueeze(1) == torch.arange(logits.shape[1])[:, None, None]
    found = []
    for function in (sum_of_powers, plain_sum_of_powers):
        log_probs = torch.log_softmax(logits, dim=1).requires_grad_()
        sums = function(log_probs, where, power)
        (gradient,) = torch.autograd.grad((sums * torch.arange(1.0, 5.0)).sum(), log_probs)
        found.append((sums, gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def plain_sum_of_powers(log_probs, where, power):
    return torch.where(where, (power * log_probs).exp(), 0.0).sum(dim=(2, 3))


def test_a_bundle_holds_the_activations_of_one_head(alone, monkeypatch):
    """All that a head computes is gone when the next one begins."""
    made, gone = [], []

    def watched(logits, size):
        scores = upsample(logits, size)
        made.extend(map(weakref.ref, (logits, scores)))
        return scores

    monkeypatch.setattr(cell_trainer, "upsample", watched)
    trainers = [CellTrainer(a_cell(loss), 3, CLASS_WEIGHTS, alone) for loss in ("WCE", "WDL", "CE")]
    for trainer in trainers:
        trainer.network.register_forward_pre_hook(
            lambda *_: gone.append([one() is None for one in made])
        )
        for module in trainer.network.modules():
            module.register_forward_hook(lambda *given: made.append(weakref.ref(given[-1])))
    for trainer in trainers:
        trainer.step(*a_share(0), 0, 10)
    of_a_head = len(made) // 3
    assert of_a_head > 5 and [len(each) for each in gone] == [0, of_a_head, 2 * of_a_head]
    assert all(map(all, gone))
