"""Signals only set a flag; the work is done between two steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.distributed import preemption
from hpc.distributed.preemption import STOP_SIGNALS, stop_request

REPOSITORY = Path(__file__).parents[3]

# A job: after every step, which is a line of its input, it prints whether it must stop.
JOB = """
import os, signal, sys
from hpc.distributed.preemption import stop_request
# not written through sys.stdout, which may be inside a call when the signal arrives
signal.signal(signal.SIGUSR2, lambda *_: os.write(1, b"as before\\n"))
with stop_request() as stop:
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "end\\n":
            break
        print(stop.signal.name if stop else "going on", flush=True)
print("ended", flush=True)
for line in sys.stdin:
    print("still here", flush=True)
"""

# A job with a loader process, whose process id it prints first.
WITH_WORKER = """
import multiprocessing, signal, sys, time
from hpc.distributed.preemption import ignore_stop_signals, stop_request
def work(ready):
    ignore_stop_signals(0)
    ready.set()
    time.sleep(60)
context = multiprocessing.get_context("fork")
ready = context.Event()
with stop_request() as stop:
    worker = context.Process(target=work, args=(ready,))
    worker.start()
    ready.wait()
    print(worker.pid, flush=True)
    for line in sys.stdin:
        worker.join(0.1)
        print(stop.signal.name if stop else "going on", worker.is_alive(), flush=True)
"""


class Job:
    """A real process, to be signalled and asked."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.first = self.answer()

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ask(self, line: str = "step") -> str:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()


@pytest.fixture
def job() -> Iterator[Job]:
    started = Job(JOB)
    assert started.first == "ready"
    yield started
    started.end()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_signal_is_seen_at_the_next_step(job, number):
    assert job.ask() == "going on"
    job.process.send_signal(number)
    assert job.ask() == number.name
    assert job.ask() == number.name
    assert job.process.poll() is None  # it ends when it has saved


def test_the_first_signal_says_why_and_a_second_changes_nothing(job):
    job.process.send_signal(signal.SIGUSR2)  # the time limit is near
    assert job.ask() == "SIGUSR2"
    job.process.send_signal(signal.SIGTERM)  # the time limit is here
    job.process.send_signal(signal.SIGINT)
    assert job.ask() == "SIGUSR2"


def test_handlers_are_restored_after_the_job(job):
    assert job.ask("end") == "ended"
    job.process.send_signal(signal.SIGUSR2)
    assert job.answer() == "as before"
    assert job.ask() == "still here"
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(timeout=10) == -signal.SIGTERM


def test_handlers_are_restored_after_an_error():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(ValueError, match="a bug"), stop_request():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
        raise ValueError("a bug")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_without_a_signal_no_stop_is_requested():
    with stop_request() as stop:
        assert not stop
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.signal is signal.SIGTERM
    with stop_request() as stop:
        assert not stop  # another start, another flag


@pytest.fixture
def with_worker() -> Iterator[Job]:
    started = Job(WITH_WORKER)
    yield started
    started.end()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_all_processes_of_a_job_leaves_its_loaders_alive(with_worker, number):
    assert with_worker.ask() == "going on True"
    os.killpg(with_worker.process.pid, number)
    assert with_worker.ask() == f"{number.name} True"
    os.kill(int(with_worker.first), number)  # nor is it hit alone
    assert with_worker.ask() == f"{number.name} True"


def test_a_signal_that_arrives_while_handlers_are_set_counts(monkeypatch):
    early = preemption.StopRequest()
    set_handler = signal.signal

    def interrupted(*arguments):
        early._note(signal.SIGUSR2, None)  # the handler of `keep_early_notice` runs a last time
        return set_handler(*arguments)

    monkeypatch.setattr(preemption, "_early", early)
    monkeypatch.setattr(signal, "signal", interrupted)
    with stop_request() as stop:
        assert stop.signal == signal.SIGUSR2
