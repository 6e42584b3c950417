"""While the ranks exchange one head's gradients, the next head computes; and the weights become
what DistributedDataParallel by itself makes of them, which waits."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpc import exchange
from jobs.training import cell_trainer as cell_trainer
from jobs.training.cell_trainer import CellTrainer, step_in_turn
from tests.jobs.cells import CLASS_WEIGHTS, MODEL, a_cell, a_share
from tests.jobs.ranks import on_ranks

DEEPLAB = "deeplabv3_mobilenet_v3_large"
BUNDLE = [("WCE", MODEL), ("WDLWCE", DEEPLAB), ("WDLNWCE", MODEL)]
STEPS = 3
PATIENCE = timedelta(seconds=20)


def trainees_of(group, names, **protocol):
    cells = [a_cell(loss, model, learning_rate=0.1, **protocol) for loss, model in names]
    return [CellTrainer(cell, 3, CLASS_WEIGHTS, group) for cell in cells]


def bits(value):
    """A hash of all tensors of a state."""
    if isinstance(value, dict):
        return hashlib.sha256("".join(bits(one) for one in value.values()).encode()).hexdigest()
    return hashlib.sha256(torch.as_tensor(value).numpy().tobytes()).hexdigest()


def train(group, trainers, in_turn, **share):
    for step in range(STEPS):
        inputs, batch, target = a_share(step, group.rank, group.world_size, **share)
        active = [trainer for trainer in trainers if trainer.failure is None]
        in_turn(active, inputs, batch, target, step, STEPS)
    return [bits(trainer.state()) for trainer in trainers]


def one_by_one(trainers, *share):
    for trainer in trainers:
        trainer.step(*share)


# --- the bits of torch's own exchange ---------------------------------------------------------


def waiting(parallel, group):
    """What DistributedDataParallel does without a hook: it waits itself."""
    return SimpleNamespace(wait=lambda: None)


def ours_and_torchs(group):
    """The states of a bundle by either way, and how many all-reduces ours began for a cell."""
    trainers = trainees_of(group, BUNDLE)
    ours = train(group, trainers, step_in_turn)
    trainers[1].start_step(*a_share(0, group.rank, group.world_size), 0, STEPS)
    begun = len(trainers[1]._exchange._started)
    trainers[1].finish_step()
    cell_trainer.Exchange = waiting
    return ours, train(group, trainees_of(group, BUNDLE), one_by_one), begun


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_weights_and_momentum_are_those_of_torchs_own_exchange(tmp_path, world_size):
    outcomes = on_ranks(world_size, tmp_path, ours_and_torchs)
    for ours, torchs, begun in outcomes:
        assert ours == torchs
        assert ours[0] != ours[2]
        assert begun > 1 if world_size > 1 else begun == 0  # several buckets


def in_fp16(group):
    """As on a GPU; the second scale is so large that every step overflows, so no weight moves."""
    cell_trainer.is_mixed = lambda *_: True
    small = {"images": 2, "size": (960, 1, 2)}
    found = []
    for exchange_of in (exchange.Exchange, waiting):
        cell_trainer.Exchange = exchange_of
        trainers = trainees_of(group, BUNDLE[::2], precision="mixed")
        for trainer, scale in zip(trainers, (2.0**10, 2.0**60), strict=True):
            state = trainer.state()
            trainer.load({**state, "scaler": {**state["scaler"], "scale": scale}})
        found.append(train(group, trainers, step_in_turn, **small))
        found[-1] += [trainer.state()["scaler"]["scale"] for trainer in trainers]
    return found


def test_in_fp16_they_are_too_and_so_are_the_scales(tmp_path):
    for ours, torchs in on_ranks(2, tmp_path, in_fp16):
        assert ours == torchs
        assert ours[-2:] == [2.0**10, 2.0**57]


class Branches(nn.Module):
    """A branch that is used by rank 0 alone, and one that nobody uses."""

    def __init__(self):
        super().__init__()
        self.shared, self.own, self.idle = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x, rank):
        return self.shared(x) + self.own(x) if rank == 0 else self.shared(x)


def gradients_of_branches(group):
    found = []
    for exchange_of in (exchange.Exchange, waiting):
        torch.manual_seed(0)
        module = Branches()
        parallel = DistributedDataParallel(
            module, find_unused_parameters=True, gradient_as_bucket_view=True
        )
        pending = exchange_of(parallel, group)
        parallel(torch.full((2, 3), 1.0 + group.rank), group.rank).sum().backward()
        pending.wait()
        found.append({name: p.grad for name, p in module.named_parameters()})
    return found


def test_what_one_rank_does_not_use_has_the_gradient_of_the_others(tmp_path):
    for ours, torchs in on_ranks(3, tmp_path, gradients_of_branches):
        assert ours["idle.weight"] is torchs["idle.weight"] is None
        used = [name for name in torchs if not name.startswith("idle.")]
        assert all(torch.equal(ours[name], torchs[name]) for name in used)
        assert torch.equal(ours["own.weight"], torch.full((3, 3), 2 / 3))
        assert torch.equal(ours["shared.weight"], torch.full((3, 3), 4.0))


def beside_one_that_fails(group):
    """The states of two cells, alone and on both sides of one whose second loss is not finite."""
    honest = cell_trainer.combined_loss

    def broken(logits, target, loss, position, *rest):
        value = honest(logits, target, loss, position, *rest)
        return value * float("nan") if loss.name == "FL" and position > 0 else value

    cell_trainer.combined_loss = broken
    pair = train(group, trainees_of(group, BUNDLE[::2]), step_in_turn)
    first, last = BUNDLE[::2]
    trainers = trainees_of(group, [first, ("FL", MODEL), last])
    beside = train(group, trainers, step_in_turn)
    return pair, beside, trainers[1].failure


def test_a_cell_that_fails_changes_nothing_for_its_neighbours(tmp_path):
    for pair, beside, failure in on_ranks(2, tmp_path, beside_one_that_fails):
        assert failure == "the loss was nan at step 1 of 3"
        assert beside[::2] == pair


# --- what happens meanwhile -------------------------------------------------------------------


def with_a_slow_rank(group, folder):
    """Two cells, and rank 1 begins to exchange only when rank 0 waits for the first. What happened
    on this rank, in order; and the states."""
    first, second = trainees_of(group, BUNDLE[::2])
    happened, events = [], dist.FileStore(f"{folder}/events", 2)
    honest = first._exchange.wait

    def wait():
        happened.append("waits for the first")
        if group.is_main:
            events.set("rank 0 waits", "")
        honest()

    def exchange_late(gradients, **options):
        events.wait(["rank 0 waits"], PATIENCE)
        dist.all_reduce(gradients, group=options["group"])

    def all_reduce(gradients, **options):
        return SimpleNamespace(wait=network.submit(exchange_late, gradients, **options).result)

    first._exchange.wait = wait
    second.network.register_forward_pre_hook(lambda *_: happened.append("enters the second"))
    foremost = next(second.network.parameters())  # the last to have its gradient
    foremost.register_post_accumulate_grad_hook(lambda _: happened.append("leaves the second"))
    share = a_share(0, group.rank, group.world_size)
    with ThreadPoolExecutor(1) as network, pytest.MonkeyPatch.context() as patch:
        if not group.is_main:
            patch.setattr(exchange, "dist", SimpleNamespace(all_reduce=all_reduce))
        step_in_turn([first, second], *share, 0, STEPS)
    return happened, [bits(trainer.state()) for trainer in (first, second)]


def one_step(group):
    trainers = trainees_of(group, BUNDLE[::2])
    one_by_one(trainers, *a_share(0, group.rank, group.world_size), 0, STEPS)
    return [bits(trainer.state()) for trainer in trainers]


def test_the_next_head_is_through_before_the_others_gradients_are_waited_for(tmp_path):
    """They cannot be there yet: the other rank has not begun to send any."""
    slow, usual = tmp_path / "slow", tmp_path / "usual"
    slow.mkdir(), usual.mkdir()
    expected = on_ranks(2, usual, one_step)
    assert expected[0] == expected[1]
    for happened, states in on_ranks(2, slow, with_a_slow_rank, slow):
        assert happened == ["enters the second", "leaves the second", "waits for the first"]
        assert states == expected[0]
