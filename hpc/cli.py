"""The edge of every command: where a user's mistake becomes one line and exit code 2."""

from __future__ import annotations

import argparse
import atexit
import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from hpc.output import lost_output, protect_output

USER_ERROR_EXIT_CODE = 2
SLOW_SECONDS = 30.0  # after which whoever waits says for what


class UserError(Exception):
    """Something the user can mend. The message is one line: what, where, and what to do."""


class MissingInput(UserError):
    """A file or folder to be read is not there yet. A dry run notes it and goes on."""


class _OneLineParser(argparse.ArgumentParser):
    # argparse declares overloads for other namespaces, which nobody here gives it
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Options may stand between the other arguments: `grid --wait CONFIG`."""
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR_EXIT_CODE, f"error: {message} (see {self.prog} --help)\n")


def argument_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose errors are one line, and that has `--debug` like every command of ours."""
    parser = _OneLineParser(prog=prog, description=description)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def one_line(text: str) -> str:
    """`text` with line breaks and control characters escaped, so that it stays one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def unreadable(error: OSError, message: str) -> UserError:
    """Return the error to raise for `error`: `MissingInput` if nothing is there."""
    absent = isinstance(error, (FileNotFoundError, NotADirectoryError))
    return MissingInput(message) if absent else UserError(message)


def warn(text: str) -> None:
    """A line on stderr that begins with `warning: `."""
    sys.stderr.write(f"warning: {one_line(text)}\n")
    sys.stderr.flush()


@contextmanager
def named_wait(what: str) -> Iterator[None]:
    """Print one line on stderr if the block, which waits for `what`, takes longer than
    `SLOW_SECONDS`."""
    line = one_line(f"waiting for {what}, {SLOW_SECONDS:.0f} s so far")
    timer = threading.Timer(SLOW_SECONDS, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Call `main(argv)` and leave the process: its return value or 0, 2 for a `UserError` or for
    output that a full disk did not take, 130 after Ctrl-C. The traceback of a `UserError` is shown
    only with `--debug`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    protect_output()
    atexit.register(gc.freeze)  # else the process looks through all it has for garbage as it ends
    try:
        code = main(arguments) or 0
        if lost := lost_output():
            raise UserError(f"cannot write all of the output: {lost.strerror}; the rest was done")
        sys.exit(code)
    except UserError as error:
        if "--debug" in arguments:
            raise
        # in one write, so that the lines of many ranks do not mix
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        sys.exit(USER_ERROR_EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
