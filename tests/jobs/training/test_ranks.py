"""A cell trains to the same weights on 1, 2 and 4 ranks, up to rounding, whatever its loss.

Four images a batch, of which the ranks have three and one, or one each, or none at all. Void is
spread unevenly: at a step the last image has no label, at the next only the last one has any, so
that ranks have nothing to learn from. Dropout is on. The oracle is torch alone: a head without a
process group on the whole batch, and torch's SGD.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead

from hpc.distributed.process_group import Group
from jobs.data.batches import Batch
from jobs.losses.functional import combined_loss
from jobs.losses.grammar import KINDS, parse_loss
from jobs.models.build import _HEADS, Network, build_backbone, build_head, upsample
from jobs.models.dropout import set_dropout_position
from jobs.models.registry import FEATURE_CHANNELS
from jobs.training.cell_trainer import CellTrainer, learning_rate
from tests.jobs.cells import CLASS_WEIGHTS, VOID, a_cell
from tests.jobs.ranks import on_ranks

MOBILE = "mobilenet_v3_large"
FCN, DEEPLAB = f"fcn_{MOBILE}", f"deeplabv3_{MOBILE}"
FIRST, TOTAL = 2, 5  # both ramps are under way at each of the steps 2, 3 and 4 of 5
IMAGES, SIZE, NARROW = 4, (24, 32), 8
SPLITS = [(4,), (3, 1), (1, 1, 1, 1), (3, 1, 0, 0)]  # images a rank
# share of void pixels of each image, at each of the three steps
UNLABELLED = [(0.0, 0.1, 0.6, 1.0), (1.0, 1.0, 1.0, 0.3), (0.3, 0.0, 0.8, 0.1)]

TERMS = [w + kind for kind in KINDS for w in ("", "W")]  # tried on one head: a loss sees logits
# one of each way to join two terms; every pair follows, since a loss is linear in its terms
PAIRS = ["WFLTL", "WDLNWCE", "CEMPAFLMP"]


class Case(NamedTuple):
    """A cell to train, and the way in which it is trained."""

    model: str
    loss: str
    precision: str = "float64"
    channels: int = NARROW  # of the features; few, since every loss of the grammar is tried
    train: str = "head"  # or all, from images
    wrong: str = ""  # the way in which ranks would change the result


EXACT = [*(Case(FCN, loss) for loss in (*TERMS, *PAIRS)), *(Case(DEEPLAB, loss) for loss in PAIRS)]
EXACT += [Case(model, "WDLNWCE", channels=960) for model in (FCN, DEEPLAB)]
EXACT += [Case(FCN, "WDLWCE", channels=960, train="all")]
SINGLE = [case._replace(precision="float32") for case in EXACT if case.loss in (*TERMS, "WDLNWCE")]
WRONG = [
    *(
        Case(FCN, loss, wrong="own means")
        for loss in ("CE", "WCE", "FL", "WFL", "DL", "WDLWCE", "TL", "CEMP", "WFLMP")
    ),
    *(Case(model, "WCE", wrong="own statistics") for model in (FCN, DEEPLAB)),
    *(Case(model, "WCE", wrong="own dropout") for model in (FCN, DEEPLAB)),
]


def cases_of(split):
    """Single precision and what is wrong are tried where shares differ. Terms are enough for one
    rank, which gives the bits of the oracle, and for ranks without an image."""
    if split == (3, 1):
        return [*EXACT, *SINGLE, *WRONG]
    return EXACT if split == (1, 1, 1, 1) else [case for case in EXACT if case.loss in TERMS]


class OwnMeans(Group):
    """Takes every rank's own sums for an equal part of all."""

    def sum(self, value):
        return value.detach() * self.world_size


class OwnStatistics(Group):
    """Leaves batch norm to each rank."""

    process_group = None


WRONG_GROUPS = {"own means": OwnMeans, "own statistics": OwnStatistics}


class Step(NamedTuple):
    """The results of a step: loss, gradient of each parameter, and change of all parameters."""

    loss: list
    gradients: list
    update: list


class Outcome(NamedTuple):
    """The distances of a rank from the oracle, in one case; rank 0 measures them.

    They are norms relative to that of the oracle's value, the largest of all steps and parameters.
    """

    loss: float
    gradient: float
    update: float
    bits: int  # of all it computed, summed as integers


def whole_batch(case, step):
    """The inputs, features or images, and label maps of 3 classes."""
    generator = torch.Generator().manual_seed(step)
    size = (case.channels, 3, 4) if case.train == "head" else (3, *SIZE)
    inputs = torch.randn(IMAGES, *size, generator=generator, dtype=torch.float64).relu()
    target = torch.randint(3, (IMAGES, *SIZE), generator=generator)
    void = torch.tensor(UNLABELLED[step - FIRST])[:, None, None]
    target[torch.rand(target.shape, generator=generator) < void] = VOID
    return inputs.to(torch.get_default_dtype()), target


def set_up(case):
    """The cell of a case. Changes are to the process of this rank alone."""
    torch.set_default_dtype(getattr(torch, case.precision))
    FEATURE_CHANNELS[MOBILE] = case.channels
    _HEADS["deeplabv3"] = narrow_deeplab if case.channels == NARROW else DeepLabHead
    return a_cell(case.loss, case.model, learning_rate=0.1, train=case.train)


def narrow_deeplab(in_channels, num_classes):
    """`DeepLabHead` with 16 channels where it has 256."""
    return nn.Sequential(
        ASPP(in_channels, (12, 24, 36), 16),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, num_classes, 1),
    )


def by_torch(case):
    """The steps of one process that has the whole batch."""
    cell = set_up(case)
    protocol = cell.protocol
    network = build_head(cell.model, 3, cell.seed, protocol.batchnorm_momentum)
    if case.train == "all":
        network = Network(build_backbone(MOBILE, 0, 0.1), network)
    parameters = list(network.train().parameters())
    optimizer = torch.optim.SGD(
        parameters, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    for step in range(FIRST, TOTAL):
        inputs, target = whole_batch(case, step)
        set_dropout_position(network, cell.seed, cell.model, step, range(IMAGES))
        weights = torch.from_numpy(CLASS_WEIGHTS)
        logits = upsample(network(inputs), SIZE)
        loss = combined_loss(logits, target, cell.loss, step / TOTAL, weights, VOID)
        before = copied(parameters)
        optimizer.param_groups[0]["lr"] = learning_rate(protocol, step, TOTAL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield outcome_of(loss.item(), parameters, before)


def by_ranks(group, case, split):
    """The steps of a rank that has its share of the batch."""
    cell = set_up(case)
    if case.wrong in WRONG_GROUPS:
        group = WRONG_GROUPS[case.wrong](group.env, group.device)
    whole = case.train == "all"
    backbone = build_backbone(MOBILE, 0, 0.1, group.process_group) if whole else None
    trainer = CellTrainer(cell, 3, CLASS_WEIGHTS, group, backbone)
    parameters = list(trainer.network.parameters())
    first = sum(split[: group.rank])
    places = range(first, first + split[group.rank])
    for step in range(FIRST, TOTAL):
        inputs, target = (part[places.start : places.stop] for part in whole_batch(case, step))
        nothing = torch.zeros(len(places), 3, *SIZE, dtype=torch.uint8)
        batch = Batch(nothing, target.to(torch.uint8), places)
        if case.wrong == "own dropout":
            batch = replace(batch, positions=range(len(places)))
        before = copied(parameters)
        loss = trainer.step(inputs, batch, target, step, TOTAL)
        yield outcome_of(loss, parameters, before)


def outcome_of(loss, parameters, before):
    updates = [p.detach() - was for p, was in zip(parameters, before, strict=True)]
    moved = torch.cat([update.flatten() for update in updates])
    return Step([torch.tensor(loss)], [p.grad.clone() for p in parameters], [moved])


def copied(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def all_outcomes(group, split):
    return [tuple(outcome(group, case, split)) for case in cases_of(split)]


def outcome(group, case, split):
    mine = list(by_ranks(group, case, split))
    expected = list(by_torch(case)) if group.is_main else []
    pairs = list(zip(mine, expected, strict=False))
    distances = [
        max((distance(a[part], b[part]) for a, b in pairs), default=0.0)
        for part in range(len(Step._fields))
    ]
    integers = torch.int64 if case.precision == "float64" else torch.int32
    tensors = [tensor for step in mine for part in step for tensor in part]
    return Outcome(*distances, sum(int(tensor.view(integers).sum()) for tensor in tensors))


def distance(found, expected):
    """The largest distance of one tensor, relative to its norm; or to that of all of them where its
    own is rounding: a bias before a 1 x 1 convolution and its batch norm has no gradient."""
    apart = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)])
    own = torch.stack([tensor.norm() for tensor in expected])
    return float((apart / torch.where(own > 1e-12 * own.norm(), own, own.norm())).max())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The outcome of a case on each of the ranks that share a batch in this way."""

    @cache
    def found(split):
        folder = tmp_path_factory.mktemp("ranks")
        of_ranks = on_ranks(len(split), folder, all_outcomes, split)
        outcomes = zip(*of_ranks, strict=True)
        return {
            case: [Outcome(*one) for one in outcome]
            for case, outcome in zip(cases_of(split), outcomes, strict=True)
        }

    return lambda split, case: found(split)[case]


def each(cases):
    """Every split with every case that is tried under it."""
    return [
        pytest.param(
            split,
            case,
            id=f"{'+'.join(map(str, split))}-{'-'.join(map(str, case))}",
            marks=() if split == (3, 1) else pytest.mark.slow,
        )
        for split in SPLITS
        for case in cases
        if case in cases_of(split)
    ]


@pytest.mark.parametrize(("split", "case"), each(EXACT))
def test_ranks_change_nothing_but_rounding(ranks, split, case):
    on_main, *others = ranks(split, case)
    assert max(on_main[:3]) < 1e-10
    assert all(rank.bits == on_main.bits for rank in others)


@pytest.mark.parametrize(("split", "case"), each(SINGLE))
def test_ranks_change_little_in_single_precision(ranks, split, case):
    on_main, *others = ranks(split, case)
    assert max(on_main[:3]) < 1e-4
    assert all(rank.bits == on_main.bits for rank in others)


@pytest.mark.parametrize(("split", "case"), each(WRONG))
def test_what_ranks_do_on_their_own_would_train_another_network(ranks, split, case):
    assert ranks(split, case)[0].gradient > 0.1


def test_the_cases_are_all_terms_of_the_grammar_and_both_heads():
    tried = {(case.model, case.loss) for case in EXACT}
    assert tried == {*product([FCN], [*TERMS, *PAIRS, "WDLWCE"]), *product([DEEPLAB], PAIRS)}
    assert len(TERMS) == 2 * len(KINDS)
    assert all(parse_loss(loss).name == loss for _, loss in tried)
    for split in ((3, 1), (1, 1, 1, 1)):
        assert set(EXACT) <= set(cases_of(split))
