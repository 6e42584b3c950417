"""A cell trains to the same weights on 1, 2 and 4 ranks, up to rounding, whatever its loss.

Five images a batch, so that ranks have uneven shares; the first two have no label at all, so that
on two and on four ranks the first one has nothing to learn from. Dropout is on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from hpc.groups import Group
from jobs.models.build import build_backbone
from jobs.trainee import Trainee
from tests.jobs.cells import CLASS_WEIGHTS, FEATURES, IMAGES, a_cell, a_share
from tests.jobs.ranks import on_ranks

MOBILE = "mobilenet_v3_large"
FCN, DEEPLAB = f"fcn_{MOBILE}", f"deeplabv3_{MOBILE}"
LOSSES = ["CE", "WCE", "DL", "WDL", "FL", "WFL", "DLCE", "WDLWCE", "WDLNWCE", "FLACE"]
FIRST, TOTAL = 2, 5  # both ramps are under way at each of the steps 2, 3 and 4 of 5


class Case(NamedTuple):
    """What is trained, and how."""

    model: str
    loss: str
    steps: int = 3
    precision: str = "float64"
    images: int = 5
    train: str = "head"  # or all, from images
    own_means: bool = False  # the wrong way: a mean of the ranks' own means

    @property
    def void(self) -> tuple[int, ...]:
        """The places of the images without a label."""
        return (0, 1) if self.images == 5 else ()


EXACT = [Case(FCN, loss) for loss in LOSSES]
# the larger head takes longer, and what follows its gradient is the same for all losses
EXACT += [Case(DEEPLAB, loss, steps=3 if loss == "WDLNWCE" else 1) for loss in LOSSES]
SINGLE = [Case(FCN, "WDLWCE", 3, "float32"), Case(DEEPLAB, "WDLWCE", 1, "float32")]
# three images are too few for four ranks
EMPTY_SHARE = [Case(FCN, "WDLWCE", images=3), Case(DEEPLAB, "WDLWCE", steps=1, images=3)]
OWN_MEANS = [Case(FCN, loss, steps=1, own_means=True) for loss in ("CE", "WFL", "DL", "WDLWCE")]
WHOLE = [Case(FCN, "WDLWCE", train="all"), Case(DEEPLAB, "CE", steps=1, train="all")]
CASES = [*EXACT, *SINGLE, *EMPTY_SHARE, *OWN_MEANS, *WHOLE]


class OwnMeans(Group):
    """Takes every rank's own sums for an equal part of all."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value.detach() * self.world_size


class Trained(NamedTuple):
    """What became of a case on a rank, as one vector each."""

    losses: torch.Tensor  # of every step
    gradient: torch.Tensor  # of the first step
    update: torch.Tensor  # by which all steps together moved the weights


class Outcome(NamedTuple):
    """What a rank found for a case."""

    distances: list[float]  # from losses, gradient and update of one rank, relative to these
    bits: int  # of the update, summed as integers


def train(group, case):
    torch.set_default_dtype(getattr(torch, case.precision))
    if case.own_means:
        group = OwnMeans(group.env, group.device)
    cell = a_cell(case.loss, case.model, learning_rate=0.1, train=case.train)
    whole = case.train == "all"
    backbone = build_backbone(MOBILE, 0, 0.1, group.process_group) if whole else None
    trainee = Trainee(cell, 3, CLASS_WEIGHTS, group, backbone)
    parameters, losses = list(trainee.network.parameters()), []
    before = flat(parameters)
    for step in range(FIRST, FIRST + case.steps):
        size = IMAGES if whole else FEATURES
        share = a_share(step, group.rank, group.world_size, case.images, case.void, size)
        losses.append(trainee.step(*share, step, TOTAL))
        if step == FIRST:
            gradient = flat(parameter.grad for parameter in parameters)
    return Trained(torch.tensor(losses), gradient, flat(parameters).sub_(before))


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def lead(group, folder):
    """One rank trains all cases and leaves what became of them."""
    for number, case in enumerate(CASES):
        if not case.own_means:
            for name, vector in train(group, case)._asdict().items():
                np.save(folder / f"{number}-{name}.npy", vector.numpy())


def follow(group, folder):
    """Each rank trains its share of all cases and measures its distance from the one rank."""
    outcomes = []
    for case in CASES:
        number = CASES.index(case._replace(own_means=False, steps=3) if case.own_means else case)
        mine = train(group, case)
        distances = [
            distance(vector, torch.from_numpy(np.load(folder / f"{number}-{name}.npy")))
            for name, vector in mine._asdict().items()
            if not case.own_means or name == "gradient"
        ]
        integers = torch.int64 if case.precision == "float64" else torch.int32
        outcomes.append((distances, int(mine.update.view(integers).sum())))
    return outcomes


def distance(found, expected):
    scale = float(expected.norm())
    return float(expected.sub_(found).norm()) / scale


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The folder of what one rank found on the whole batches."""
    folder = tmp_path_factory.mktemp("one-rank")
    on_ranks(1, tmp_path_factory.mktemp("rank"), lead, folder)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, one_rank, tmp_path_factory):
    """The outcome of a case on each of two or four ranks."""
    found = on_ranks(request.param, tmp_path_factory.mktemp("ranks"), follow, one_rank)
    return lambda case: [Outcome(*outcomes[CASES.index(case)]) for outcomes in found]


def named(case):
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", [*EXACT, *EMPTY_SHARE, *WHOLE], ids=named)
def test_ranks_change_nothing_but_rounding(ranks, case):
    for outcome in ranks(case):
        assert len(outcome.distances) == 3
        assert max(outcome.distances) < 1e-10


@pytest.mark.parametrize("case", SINGLE, ids=named)
def test_ranks_change_little_in_single_precision(ranks, case):
    for outcome in ranks(case):
        assert max(outcome.distances) < 1e-4


@pytest.mark.parametrize("case", CASES, ids=named)
def test_all_ranks_hold_the_same_bits(ranks, case):
    assert len({outcome.bits for outcome in ranks(case)}) == 1


@pytest.mark.parametrize("case", OWN_MEANS, ids=named)
def test_a_mean_of_the_ranks_own_means_would_train_another_network(ranks, case):
    """Only the gradient of the first step is compared."""
    for outcome in ranks(case):
        assert outcome.distances[0] > 0.1
