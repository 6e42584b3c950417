"""A command reports a user's mistake in one line, and a bug with its traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpc import cli
from hpc.cli import UserError, argument_parser, named_wait, one_line, run

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys
from hpc.cli import UserError, argument_parser, run
def main(argv):
    parser = argument_parser("program", "Does things.")
    parser.add_argument("what")
    what = parser.parse_args(argv).what
    if what == "mistake":
        raise UserError("data/x is damaged;\\ndelete it")
    if what == "bug":
        raise ValueError("a bug")
    if what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if what == "talk":
        for _ in range(100_000):
            print("a line")
        open(sys.argv[0] + ".done", "w").close()
    if what == "name":
        print("Größe", flush=True)
    return 3 if what == "three" else None
run(main)
"""


@pytest.fixture
def program(tmp_path):
    """A program whose argument selects its behaviour."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)

    def call(*arguments, shell='exec "$@"', **environ):
        line = ["sh", "-c", shell, "sh", sys.executable, str(path), *arguments]
        environ |= {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(line, env=environ, capture_output=True, text=True, timeout=30)

    return call


def test_a_command_without_a_mistake_ends_with_0_or_its_own_code(program):
    assert program("nothing").returncode == 0
    assert program("three").returncode == 3


def test_a_users_mistake_is_one_line_and_exit_code_2(program):
    done = program("mistake")
    assert done.returncode == 2
    assert done.stderr == "error: data/x is damaged;\\ndelete it\n"
    assert done.stdout == ""


def test_debug_shows_the_traceback(program):
    done = program("mistake", "--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "hpc.cli.UserError: data/x is damaged;" in done.stderr


def test_a_bug_keeps_its_traceback(program):
    done = program("bug")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: a bug\n")
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["x", "--nonsense"], ["x", "y"]])
def test_wrong_arguments_are_one_line_and_exit_code_2(program, arguments):
    done = program(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("(see program --help)\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["grid", "a.toml", "--debug"], ["grid", "--debug", "a.toml"],
                                   ["--debug", "grid", "a.toml"]])  # fmt: skip
def test_options_may_stand_anywhere(words):
    parser = argument_parser("python -m program", None)
    parser.add_argument("stage")
    parser.add_argument("config", nargs="?")
    found = parser.parse_args(words)
    assert (found.stage, found.config, found.debug) == ("grid", "a.toml", True)


def test_help_describes_the_command(program):
    done = program("--help")
    assert done.returncode == 0
    assert "Does things." in done.stdout and "--debug" in done.stdout


def test_an_interrupt_ends_without_a_traceback(program):
    done = program("interrupt")
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "interrupted\n"


def test_a_reader_that_leaves_early_is_no_error_and_stops_nothing(program, tmp_path):
    done = program("talk", shell='{ "$@"; echo "exit code $?" >&2; } | head -1')
    assert (done.stdout, done.stderr) == ("a line\n", "exit code 0\n")
    assert (tmp_path / "program.py.done").exists()


def test_output_that_a_full_disk_does_not_take_is_one_line_and_stops_nothing(program, tmp_path):
    done = program("talk", shell='exec "$@" >/dev/full')
    assert done.returncode == 2
    assert done.stderr == (
        "error: cannot write all of the output: No space left on device; the rest was done\n"
    )
    assert (tmp_path / "program.py.done").exists()


def test_errors_that_a_full_disk_does_not_take_leave_the_exit_code(program):
    assert program("mistake", shell='exec "$@" 2>/dev/full').returncode == 2


def test_a_closed_standard_output_is_no_error(program):
    done = program("name", shell='exec "$@" >&-')
    assert (done.returncode, done.stderr) == (0, "")


def test_characters_that_the_terminal_lacks_are_escaped(program):
    done = program("name", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Gr\\xf6\\xdfe\n", "")


def test_printed_output_is_flushed_before_the_command_ends(capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda argv: print("table", *argv), ["a"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "table a\n"


def test_control_characters_of_a_file_name_stay_on_the_line():
    assert one_line("a\nb\tc\x1b[31m") == "a\\nb\\tc\\x1b[31m"
    assert one_line("Größe: 3 µm") == "Größe: 3 µm"
    assert one_line("bad \udcff name").isprintable()


def test_without_arguments_those_of_the_process_are_used(monkeypatch, capsys):
    def main(argv):
        raise UserError(f"no {argument_parser('program', None).parse_args(argv)}")

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no Namespace(debug=False)\n"


def test_a_long_wait_is_reported_once(monkeypatch, capsys):
    with named_wait("nobody"):
        pass
    monkeypatch.setattr(cli, "SLOW_SECONDS", 0.01)
    with named_wait("rank 0,\nwherever it is"):
        # reading while the timer prints could lose the line
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join()
    assert capsys.readouterr().err == "waiting for rank 0,\\nwherever it is, 0 s so far\n"
