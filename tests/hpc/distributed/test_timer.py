"""A stopwatch counts every moment in one part, and none before its start."""

from types import SimpleNamespace

import pytest
import torch

from hpc.distributed import timer
from hpc.distributed.process_group import Group
from hpc.distributed.timer import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances."""
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(timer.time, "perf_counter", lambda: clock.now)

    def passes(seconds):
        clock.now += seconds

    return passes


def started():
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    return watch


def test_a_part_inside_another_is_not_counted_there(clock):
    watch = started()
    clock(1)
    with watch.part("network"):
        clock(2)
        with watch.part("communication"):
            clock(4)
        clock(8)
    clock(16)
    assert watch.lap() == {"other": 17, "network": 10, "communication": 4}


def test_a_lap_starts_at_zero_in_the_current_part(clock):
    watch = started()
    with watch.part("network"):
        clock(1)
        assert watch.lap() == {"other": 0, "network": 1}
        clock(2)
    clock(4)
    assert watch.lap() == {"network": 2, "other": 4}


def test_a_block_may_move_on_to_another_part_and_ends_where_it_began(clock):
    """A backward pass does so: it runs from the loss into the network."""
    watch = started()
    with watch.part("losses"):
        clock(1)
        watch.begin("network")
        clock(2)
    clock(4)
    assert watch.lap() == {"losses": 1, "network": 2, "other": 4}


def test_a_part_that_raises_ends_too(clock):
    watch = started()
    with pytest.raises(KeyError), watch.part("network"):
        clock(1)
        raise KeyError
    clock(2)
    assert watch.lap() == {"network": 1, "other": 2}


def test_before_its_start_a_stopwatch_measures_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    watch = Stopwatch(torch.device("cuda"))
    with watch.part("network"):
        watch.begin("losses")
    assert watch.lap() == {}


def test_a_gpu_ends_a_part_before_the_clock_is_read(clock, monkeypatch):
    """The GPU of this test needs 8 s more after the call returns."""
    stream = SimpleNamespace(synchronize=lambda: clock(8))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    watch = Stopwatch(torch.device("cuda"))
    watch.start()
    watch.begin("network")
    assert watch.lap() == {"other": 8, "network": 8}


def test_collectives_count_as_communication(clock, monkeypatch):
    group = Group(SimpleNamespace(rank=0, world_size=2), torch.device("cpu"))
    said = ("all_reduce", "broadcast_object_list")
    for name in said:
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: clock(1))
    group.watch.start()
    group.sum(torch.ones(1)), group.max(3), group.broadcast(3)
    assert group.watch.lap() == {"other": 0, "communication": 3}
