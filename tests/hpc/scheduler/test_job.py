"""A job is a module's name and strings. Its failure is one line, which is found in its logs."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpc.distributed.preemption import keep_early_notice, stop_request
from hpc.scheduler.job import ModuleCall, last_error

REPOSITORY = Path(__file__).parents[3]
PROGRAM = """
import sys
from hpc.cli import UserError
def main(arguments):
    if arguments[0] == "refuse":
        raise UserError("there is no such\\nfile")
    if arguments[0] == "code":
        return int(arguments[1])
    if arguments[0] == "bug":
        raise ValueError("a bug")
    print(arguments)
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    (tmp_path / "a_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    keep_early_notice()  # forgets one of an earlier test
    signal.signal(signal.SIGUSR2, handlers[signal.SIGUSR2])


def call(*arguments):
    return pickle.loads(pickle.dumps(ModuleCall("a_program", arguments)))


def test_the_module_gets_its_arguments(capsys):
    assert call("a", "b c")() is None
    assert capsys.readouterr().out == "['a', 'b c']\n"


def test_a_log_that_a_full_disk_does_not_take_stops_no_job(tmp_path):
    code = "from hpc.scheduler.job import ModuleCall; ModuleCall('a_program', ('größe',))()"
    with Path("/dev/full").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=log, stderr=log,
            env={"PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
    assert done.returncode == 0


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        call("refuse")()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: there is no such\\nfile\n"


def test_a_code_is_the_exit_code_and_zero_is_success():
    assert call("code", "0")() is None
    with pytest.raises(SystemExit) as ended:
        call("code", "3")()
    assert ended.value.code == 3


def test_a_bug_passes_through():
    with pytest.raises(ValueError, match="a bug"):
        call("bug")()


def test_submitits_signal_handlers_are_gone():
    signal.signal(signal.SIGTERM, lambda *_: None)
    call("x")()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_time_limits_notice_waits_for_the_jobs_own_handlers():
    call("x")()
    thread = threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGUSR2))
    thread.start()  # while torch is imported, say
    thread.join()
    with stop_request() as stop:
        assert stop.signal is signal.SIGUSR2
    os.kill(os.getpid(), signal.SIGUSR2)  # after the last step it changes nothing


def test_the_error_is_found_among_what_the_launcher_adds(tmp_path):
    first, second = tmp_path / "0.err", tmp_path / "1.err"
    first.write_text("a warning\nsrun: error: n1: task 1: Exited with exit code 2\n")
    second.write_text("error: disk full\nslurmstepd-n1: error: *** STEP 5.0 ON n1 CANCELLED ***\n")
    assert last_error([first, second]) == "error: disk full"
    assert last_error([first]) == "a warning"
    assert last_error([tmp_path / "none", tmp_path / "nothing"]) is None


def test_the_end_of_a_traceback_is_the_error(tmp_path):
    log = tmp_path / "0.err"
    log.write_text("x" * 50_000 + "\nTraceback (most recent call last):\n  f()\nValueError: boom\n")
    assert last_error([log]) == "ValueError: boom"
