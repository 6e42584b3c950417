"""Run a command: one line and exit code 2 for a user's mistake, and output that cannot fail."""

from __future__ import annotations

import argparse
import atexit
import fcntl
import gc
import io
import os
import signal
import stat
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

USER_ERROR_EXIT_CODE = 2
SLOW_SECONDS = 30.0  # a wait that takes longer is reported
_READING_SECONDS = 2.0
# logs are read as UTF-8
_ENCODING_OF_CHILDREN = {"PYTHONIOENCODING": "utf-8:backslashreplace"}


class UserError(Exception):
    """An error that the user can correct. Its message is one line: what, where, what to do."""


class MissingInput(UserError):
    """A file or folder to be read does not exist yet. A dry run notes it and goes on."""


class _OneLineParser(argparse.ArgumentParser):
    # argparse declares overloads for a given namespace, which no command passes
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Parse arguments with options anywhere between them: `grid --wait CONFIG`."""
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR_EXIT_CODE, f"error: {message} (see {self.prog} --help)\n")


def argument_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with one-line errors and the option `--debug`, which all commands have."""
    parser = _OneLineParser(prog=prog, description=description)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def one_line(text: str) -> str:
    """Return `text` with line breaks and control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def unreadable(error: OSError, message: str) -> UserError:
    """Return the error to raise for `error`: `MissingInput` if the file does not exist."""
    absent = isinstance(error, (FileNotFoundError, NotADirectoryError))
    return MissingInput(message) if absent else UserError(message)


def warn(text: str) -> None:
    """Write `text` to stderr as one line that begins with `warning: `."""
    sys.stderr.write(f"warning: {one_line(text)}\n")
    sys.stderr.flush()


@contextmanager
def named_wait(what: str) -> Iterator[None]:
    """Print one line on stderr if the block waits for `what` longer than `SLOW_SECONDS`."""
    line = one_line(f"waiting for {what}, {SLOW_SECONDS:.0f} s so far")
    timer = threading.Timer(SLOW_SECONDS, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Call `main(argv)` and exit the process.

    The exit code is the return value or 0; 2 for a `UserError` or output lost to a full disk; 130
    after Ctrl-C. The traceback of a `UserError` is shown only with `--debug`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    protect_output()
    atexit.register(gc.freeze)  # skip the garbage collection of the whole process at its end
    try:
        code = main(arguments) or 0
        if lost := lost_output():
            raise UserError(f"cannot write all of the output: {lost.strerror}; the rest was done")
        sys.exit(code)
    except (UserError, KeyboardInterrupt) as error:
        sys.exit(report_error(error, "--debug" in arguments))


def report_error(error: BaseException, debug: bool = False, rank: str = "") -> int:
    """Write the error that ends this process to stderr, and return the exit code.

    A `UserError` is one line, unless `debug`; another error is shown with its traceback, below a
    line with the name of this `rank`.
    """
    if isinstance(error, KeyboardInterrupt):
        text, code = "interrupted\n", 128 + signal.SIGINT
    elif isinstance(error, UserError) and not debug:
        text, code = f"error: {one_line(str(error))}\n", USER_ERROR_EXIT_CODE
    else:
        failed = f"{rank} failed:\n" if rank else ""
        text, code = failed + "".join(traceback.format_exception(error)), 1
    sys.stderr.write(text)  # one write, so that lines of several ranks do not mix
    return code


def flush_output() -> None:
    """Flush stdout and stderr, and wait at most 2 s each until the readers of pipes have read.

    mpiexec drops what it has not read when a rank aborts.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        end = time.monotonic() + _READING_SECONDS
        while _unread(stream) and time.monotonic() < end:
            time.sleep(0.01)


def _unread(stream: TextIO) -> int:
    """Return the number of unread bytes in the pipe behind `stream`; 0 if it is no pipe."""
    try:
        descriptor = stream.fileno()
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return 0
        answer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    except (OSError, ValueError):
        return 0
    return int.from_bytes(answer, sys.byteorder)


def leave(error: BaseException, rank: str) -> NoReturn:
    """Report `error` as `run` does, and end this process without any clean-up.

    For a rank whose clean-up would wait for other ranks.
    """
    code = 1
    try:
        code = report_error(error, "--debug" in sys.argv, rank)
        flush_output()
    finally:
        os._exit(code)


class _Sink(io.FileIO):
    """A file descriptor that keeps its first write error instead of raising it."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write `data`, or drop it after an error; return its length."""
        try:
            return super().write(data)
        except BlockingIOError:  # the caller tries again
            raise
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


def protect_output() -> None:
    """Replace the standard streams by streams that never fail.

    Characters that a terminal lacks are escaped. Output that a full disk or a closed pipe refuses
    is dropped. Streams that are not files, as in tests, stay.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the parent process closed it
            setattr(sys, name, io.TextIOWrapper(_Sink(os.devnull, "w"), encoding="utf-8"))
        elif type(stream) is io.TextIOWrapper and not isinstance(_raw(stream), _Sink):
            setattr(sys, name, _protected(stream))
    os.environ.update(_ENCODING_OF_CHILDREN)


def lost_output() -> OSError | None:
    """Return the error that lost a part of standard output.

    None if nothing was lost, or if the reader left early (`| head`).
    """
    if sys.stdout:
        sys.stdout.flush()
    sink = _raw(sys.stdout)
    lost = sink.lost if isinstance(sink, _Sink) else None
    return None if isinstance(lost, BrokenPipeError) else lost


def _protected(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    with suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Sink(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )


def _raw(stream: Any) -> Any:
    return getattr(getattr(stream, "buffer", None), "raw", None)
