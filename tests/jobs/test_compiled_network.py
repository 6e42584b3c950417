"""`compile = true`: other code for the networks, and the same promises."""

from __future__ import annotations

import copy

import pytest
import torch

from hpc.env import RankEnv
from hpc.groups import process_group
from jobs.trainee import step_in_turn
from tests.jobs.cells import a_cell, a_share
from tests.jobs.compilers import compile_into, num_compiled
from tests.jobs.test_trainee import TOTAL, assert_equal_states, trainee_of, weights

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = ("WCE", "WDLNWCE")
STEPS = 3


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of one rank, for which torch compiles, from nothing."""
    env = RankEnv("single", 0, 1, 0, node="here", job_id="", start_id="")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as its tests have it, which begin later
    with pytest.MonkeyPatch.context() as patch:
        compile_into(patch, tmp_path_factory.mktemp("compiled"))
        with process_group(env, tmp_path_factory.mktemp("rendezvous")) as group:
            yield group
    torch.set_num_threads(before)


def trainees_of(group, losses, compile):
    return [trainee_of(a_cell(loss, threads=1, compile=compile), group) for loss in losses]


def train(trainees, steps):
    """The state of each after each step."""
    states = []
    for step in steps:
        step_in_turn(trainees, *a_share(step), step, TOTAL)
        states.append(copy.deepcopy([trainee.state() for trainee in trainees]))
    return states


@pytest.fixture(scope="module")
def bundle(group):
    """Two cells whose heads are of one kind, trained side by side, and their states on the way."""
    before = num_compiled()
    trainees = trainees_of(group, LOSSES, compile=True)
    states = train(trainees, range(STEPS))
    assert num_compiled() == before + 1, "one code for both, at all steps"
    return trainees, states


def test_it_trains_as_torch_does_without_it_but_for_rounding(group, bundle):
    for trainee, loss in zip(bundle[0], LOSSES, strict=True):
        (plain,) = trainees_of(group, [loss], compile=False)
        start = weights(plain)
        train([plain], range(STEPS))
        moved = (weights(plain) - start).norm()
        assert 0 < (weights(trainee) - weights(plain)).norm() < 1e-4 * moved


def test_alone_and_resumed_where_nothing_was_kept_a_cell_has_the_same_bits(
    group, bundle, tmp_path, monkeypatch
):
    """Another process on another node: the code is made anew, of the second cell alone."""
    compile_into(monkeypatch, tmp_path)
    (alone,) = trainees_of(group, LOSSES[1:], compile=True)
    states = bundle[1]
    alone.load(copy.deepcopy(states[0][1]))
    train([alone], range(1, STEPS))
    assert list(tmp_path.rglob("*.so")), "compiled anew"
    assert_equal_states(alone.state(), states[-1][1])


def test_pictures_of_any_size_are_evaluated_by_the_plain_network(group, bundle):
    (compiled, _), states = bundle
    (plain,) = trainees_of(group, LOSSES[:1], compile=False)
    plain.load(copy.deepcopy(states[-1][0]))
    before = num_compiled()
    with torch.no_grad():
        for size in ((3, 4), (4, 3), (5, 9)):
            features = torch.randn(1, 960, *size)
            logits = [one.network.eval()(features) for one in (compiled, plain)]
            assert torch.equal(*logits)
    assert num_compiled() == before
