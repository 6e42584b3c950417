"""Loader processes outlive the signals of a job, and never their rank. They fill memory again that
the rank is done with. A process that cannot deliver ends the rank with one line."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.shards.reader import SplitReader
from hpc.cli import UserError
from jobs.data import loader
from jobs.data.batches import EvaluationImages, TrainingBatches
from jobs.data.loader import load_images, load_steps
from jobs.spec.protocol import Protocol
from tests.jobs.job_processes import lives
from tests.jobs.ranks import _PROCESSES

REPOSITORY = Path(__file__).parents[3]
EVALUATES = """
import sys, time
from pathlib import Path
from data_prep.shards.manifest import Manifest
from data_prep.shards.reader import SplitReader
from hpc.distributed.launcher import read_env
from hpc.distributed.process_group import process_group
from jobs.training.evaluate import evaluate
from jobs.spec.protocol import Protocol
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
        timeout=120,
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


@pytest.mark.parametrize("short_side", [0, 20])
def test_images_of_any_size_lie_in_slots_of_the_largest(short_side, monkeypatch):
    """Also where temporary files have names that are too long for a socket."""
    monkeypatch.setattr(tempfile, "tempdir", f"/tmp/{'t' * 100}")
    pictures = ImageIds([(30, 40), (50, 20), (25, 25), (60, 70)] * 4)
    images = EvaluationImages(pictures, Protocol(eval_size=short_side))
    places = []
    for index, pair in zip(range(1, 16, 2), load_images(images, range(1, 16, 2), 1), strict=True):
        assert all(torch.equal(*two) for two in zip(pair, images[index], strict=True))
        places.append(pair[0].data_ptr())
    assert places[:2] == places[6:] and len(set(places)) == 6


class ImageIds:
    """A reader of pictures of these sizes."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def image(self, index):
        return np.random.default_rng(index).integers(0, 256, (*self.sizes[index], 3), np.uint8)

    def label(self, index):
        return np.random.default_rng(index).integers(0, 9, self.sizes[index], np.uint8)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_a_gpu_reads_is_pinned_in_order(batches, monkeypatch, workers):
    """Without a GPU nothing can be pinned, so here it is copied instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor.clone())
    before = torch.get_num_threads()
    pinned = list(load_steps(batches, 0, 12, workers))
    with ThreadPoolExecutor(1) as another:  # the pinning thread sets no default of this process
        assert another.submit(torch.get_num_threads).result() == before
    assert all(is_that(batch, copied(batches[step])) for step, batch in enumerate(pinned))
    assert len({batch.images.data_ptr() for batch in pinned}) == len(pinned) == 12


# --- processes that do not deliver --------------------------------------------------------------


class Item2:
    """Ten items of one byte, their numbers. `act` runs before item 2 is made."""

    num_bytes = 1

    def __init__(self, act):
        self._act = act

    def view(self, _index, memory):
        return torch.from_numpy(memory)

    def write(self, index, into):
        if index == 2:
            self._act()
        into[:] = index


def fail():
    raise ZeroDivisionError("by zero")


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


CASES = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by signal 9 .Killed., .*"),
    "left": (lambda: os._exit(3), "ended with exit code 3; see this rank's log"),
    "failed": (fail, "failed at item 2 .ZeroDivisionError: by zero.; see the traceback in this .*"),
    "stopped": (stop, "no item 2 within 1 s; check the file system that holds the .*"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_process_that_does_not_deliver_is_one_line_and_is_ended(
    monkeypatch, capfd, case, workers
):
    act, message = CASES[case]
    monkeypatch.setattr(loader, "_ITEM_TIMEOUT", 1.0)
    monkeypatch.setattr(loader, "_POLL", 0.1 if case == "stopped" else 60.0)
    others = children()  # of tests before this one
    items = loader._loaded(Item2(act), range(10), workers)
    assert [int(next(items)), int(next(items))] == [0, 1]
    mine = children() - others
    with pytest.raises(UserError, match=f"loader process [0-9]+.* {message}$"):
        next(items)
    assert len(mine) == workers and not any(map(lives, mine))
    assert ("ZeroDivisionError: by zero" in capfd.readouterr().err) == (case == "failed")


def children() -> set[Path]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {Path(f"/proc/{child}") for child in listed.split()}


def fail_with_a_full_log(errors):
    os.kill = lambda *_: None  # the loader process ends by itself
    with Path("/dev/full").open("w", buffering=1) as sys.stderr, errors.open("a") as file:
        try:
            list(loader._loaded(Item2(fail), range(10), 1))
        except UserError as error:
            print(error, file=file, flush=True)


def test_a_process_that_cannot_write_its_log_ends_and_does_not_go_on_as_a_rank(tmp_path):
    rank = _PROCESSES.Process(target=fail_with_a_full_log, args=(tmp_path / "errors",))
    rank.start()
    rank.join(40)
    assert rank.exitcode == 0
    (line,) = (tmp_path / "errors").read_text().splitlines()
    assert "failed at item 2 (ZeroDivisionError: by zero)" in line


@pytest.mark.parametrize("case", [None, "killed"])
def test_a_rank_that_was_started_with_sigchld_ignored(case):
    """The kernel then waits for its children, and their exit codes are lost."""
    act = CASES[case][0] if case else lambda: None
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        items = loader._loaded(Item2(act), range(10), 2)
        if case:
            with pytest.raises(UserError, match=r"process [0-9]+ ended \(exit code unknown\); "):
                list(items)
        else:
            assert [int(item) for item in items] == list(range(10))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_processes_that_cannot_be_started_are_one_line(monkeypatch):
    forks = iter([1, 0])

    def fork():
        if not next(forks):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return real()

    real, others = os.fork, children()
    monkeypatch.setattr(os, "fork", fork)
    items = loader._loaded(Item2(fail), range(10), 2)
    with pytest.raises(UserError, match="cannot start 2 loader processes: Resource temporarily un"):
        next(items)
    assert not children() - others
