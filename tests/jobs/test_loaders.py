"""Loader processes outlive the signals of a job, and never their rank. They fill memory again that
the rank is done with."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from data_prep.shards import SplitReader
from jobs import loaders
from jobs.batches import TrainingBatches
from jobs.loaders import load_steps
from jobs.protocol import Protocol

REPOSITORY = Path(__file__).parents[2]
EVALUATES = """
import sys, time
from pathlib import Path
from data_prep.manifest import Manifest
from data_prep.shards import SplitReader
from hpc.env import read_env
from hpc.groups import process_group
from jobs.evaluate import evaluate
from jobs.protocol import Protocol
def forward(images):
    raise RuntimeError("Connection closed by peer")
manifest = Manifest.load(sys.argv[1])
protocol = Protocol(workers=1, eval_size=0)
with process_group(read_env({}), Path(sys.argv[1])) as group:
    reader = SplitReader(manifest, "val")
    evaluate(forward, 1, reader, len(manifest.classes), protocol, group, lambda: False)
"""


def test_an_error_in_the_middle_of_an_evaluation_ends_the_rank(streets):
    done = subprocess.run(
        [sys.executable, "-c", EVALUATES, str(streets.folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: Connection closed by peer\n")


# --- where batches lie ------------------------------------------------------------------------


@pytest.fixture
def batches(streets):
    return batches_of(streets)


def batches_of(streets, rank=0, world_size=1):
    protocol = Protocol(batch_size=4, resize=(30, 60), crop=(32, 48))
    return TrainingBatches(SplitReader(streets, "train"), protocol, 0, rank, world_size)


def copied(batch):
    return batch.images.clone(), batch.target.clone()


def is_that(batch, content):
    return torch.equal(batch.images, content[0]) and torch.equal(batch.target, content[1])


@pytest.fixture
def not_pinned(monkeypatch):
    """On a GPU a rank looks at copies that are pinned."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("not_pinned")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_stays_as_it_is_until_the_next_but_one_is_asked_for(batches, workers):
    """Though loaders are given the time to be as far ahead as they may."""
    before = None
    for step, batch in enumerate(load_steps(batches, 0, 8 + 4 * workers, workers)):
        time.sleep(0.1)
        expected = copied(batches[step])
        assert is_that(batch, expected)
        assert before is None or is_that(*before)
        before = batch, expected


@pytest.mark.usefixtures("not_pinned")
@pytest.mark.parametrize(("workers", "slots"), [(1, 6), (2, 10)])
def test_batches_lie_in_memory_that_is_used_again(batches, workers, slots):
    """Four a loader that may be ahead, and two that may be looked at."""
    places = [batch.images.data_ptr() for batch in load_steps(batches, 0, 2 * slots, workers)]
    assert len(set(places)) == slots
    assert places[:slots] == places[slots:]


@pytest.mark.usefixtures("not_pinned")
def test_two_that_load_at_once_do_not_meet(batches):
    for step, pair in enumerate(
        zip(*(load_steps(batches, 0, 9, 1) for _ in range(2)), strict=True)
    ):
        assert pair[0].images.data_ptr() != pair[1].images.data_ptr()
        assert all(is_that(batch, copied(batches[step])) for batch in pair)


def test_a_rank_that_has_no_image_of_a_batch(streets):
    idle = batches_of(streets, rank=0, world_size=6)
    found = list(load_steps(idle, 0, 3, workers=2))
    assert [tuple(batch.images.shape) for batch in found] == [(0, 3, 32, 48)] * 3
    assert [tuple(batch.target.shape) for batch in found] == [(0, 32, 48)] * 3


def test_what_a_loader_says_it_has_written_can_be_pinned_by_its_rank(batches, monkeypatch):
    """Without a GPU nothing can be, so here it is copied instead."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor.clone())
    slots = loaders._Slots(batches, 3)
    said = pickle.loads(pickle.dumps(slots[5]))
    pinned = pin_memory(said)
    slots[8]  # is written in the same place
    assert is_that(pinned, copied(batches[5])) and pinned.positions == range(4)
