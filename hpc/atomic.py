"""Files and folders that appear whole: unique temporary name, fsync, os.replace, fsync of the
parent. Readers never see half of one, and every JSON record carries a checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpc.command import UserError

TEMPORARY_PREFIX = ".tmp-"
_DEAD_AFTER_SECONDS = 3600.0  # since a temporary folder or anything in it was last written


class Damaged(UserError):
    """A file that exists but whose content is not what was written."""


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an error the file written
    there becomes `path` in one step, replacing an older one. On an error nothing is left.
    """
    path = Path(path)
    _make_parent(path)
    temporary = _temporary_name(path)
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` by one rename. `path` must not exist yet:
    if it does, `FileExistsError`, and the older one stays untouched.
    """
    path = Path(path)
    _make_parent(path)
    temporary = _temporary_name(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _fsync(file)
        _fsync(temporary)
        if path.exists():  # rename would silently replace an empty folder
            raise FileExistsError(f"{path} exists already")
        temporary.rename(path)
        _fsync(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:  # another writer was quicker than our look
            raise FileExistsError(f"{path} exists already") from error
        raise _explained(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """Delete a folder so that readers see it whole or not at all, even if we are killed meanwhile;
    nothing happens where there is none."""
    temporary = _temporary_name(Path(path))
    with suppress(FileNotFoundError):
        Path(path).rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_dead_folders(parent: str | Path) -> None:
    """Delete the temporary folders that killed processes left in `parent`: those to which nothing
    was written for an hour."""
    for folder in Path(parent).glob(f"{TEMPORARY_PREFIX}*/"):
        with suppress(FileNotFoundError):  # its writer has just renamed it
            written = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - written > _DEAD_AFTER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a whole file in one step."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 text file in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Write a record of plain values, with a checksum of itself under the key `checksum`."""
    body = {key: value for key, value in record.items() if key != "checksum"}
    whole = {**body, "checksum": fingerprint(body)}
    write_text(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """A record that `write_json` wrote, without its checksum.

    Raises `FileNotFoundError` if there is none and `Damaged` if it is not as it was written.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record.pop("checksum") == fingerprint(record):
            return record
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    raise Damaged(f"{path} is damaged (its checksum does not fit); delete it and run again")


def fingerprint(value: Any) -> str:
    """SHA-256 of a value of plain types in canonical JSON: equal values, equal fingerprints."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_name(path: Path) -> Path:
    # host and random part: two nodes that write the same name must not share a temporary file
    return path.parent / f"{TEMPORARY_PREFIX}{socket.gethostname()}-{uuid.uuid4().hex}"


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explained(error, path) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, path: Path) -> UserError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return UserError(f"cannot write {path}: {reason}; make room or mend permissions, run again")
