"""Standard output and error that cannot stop a command: a terminal's missing characters are
escaped, and what a full disk or a closed pipe does not take is dropped."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any

# so that logs, which are read as UTF-8, are written as such
_ENCODING_OF_CHILDREN = {"PYTHONIOENCODING": "utf-8:backslashreplace"}


class _Sink(io.FileIO):
    """A file descriptor whose write errors are kept instead of raised."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, or drop, `data`."""
        try:
            return super().write(data)
        except BlockingIOError:  # nothing is lost yet
            raise
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


def protect_output() -> None:
    """Replace the standard streams by ones that never fail. Streams that are no files of the
    process, as those of a test, stay."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, io.TextIOWrapper(_Sink(os.devnull, "w"), encoding="utf-8"))
        elif type(stream) is io.TextIOWrapper and not isinstance(_raw(stream), _Sink):
            setattr(sys, name, _protected(stream))
    os.environ.update(_ENCODING_OF_CHILDREN)


def lost_output() -> OSError | None:
    """Return why a part of standard output could not be written; None if all was, or if its reader
    left early (`| head`)."""
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
