"""Write files and folders that appear whole, and JSON records with a checksum.

Each is written under a unique temporary name, flushed to disk, renamed, and its parent is flushed.
Readers never see half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpc.cli import UserError

TEMPORARY_PREFIX = ".tmp-"
_DEAD_AFTER_SECONDS = 3600.0  # since a temporary folder or anything in it was last written
# The last line of a record holds the hash of the bytes above it, which is cheap to compare. The
# checksum of the canonical text would need the record to be encoded again; it serves as a fallback
# for a record that was reformatted.
_END = b',\n "above": "%s"\n}\n'
_NO_SHA256 = b"0" * 64
_CHECKSUMS = frozenset({"checksum", "above"})
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)
# Called when all data are on disk, right before they appear; raises if they must not appear.
Check = Callable[[], None]


class Damaged(UserError):
    """A file that cannot be read, or whose content is not what was written."""


@contextmanager
def new_file(
    path: str | Path, check: Check | None = None, final: Callable[[], Path] | None = None
) -> Iterator[Path]:
    """Yield a temporary path; the file written there becomes `path` in one step after the block.

    An older file of that name is replaced. If the block or `check` raises, nothing is left.

    Args:
        path: where the file appears; its folder is made if it is missing.
        check: called right before the file appears; raises to prevent it.
        final: called after the block; returns the path to use instead, in the same folder.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    _make_parent(path)
    temporary = _temporary_name(path)
    try:
        yield temporary
        fsync(temporary)
        if check is not None:
            check()
        temporary.replace(final() if final is not None else path)
        fsync(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        with suppress(OSError):  # it was renamed, or the disk has become read-only
            temporary.unlink()


@contextmanager
def new_folder(path: str | Path, check: Check | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` by one rename, unless `check` raises.

    Raises:
        FileExistsError: `path` exists already; it stays untouched.
        UserError: the folder cannot be written.
    """
    path = Path(path)
    _make_parent(path)
    temporary = _temporary_name(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            fsync(file)
        fsync(temporary)
        if path.exists():  # rename would silently replace an empty folder
            raise FileExistsError(f"{path} exists already")
        if check is not None:
            check()
        temporary.rename(path)
        fsync(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:  # another writer came between the test and the rename
            raise FileExistsError(f"{path} exists already") from error
        raise _explained(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_files(folder: str | Path, last: str) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved into `folder` after the block.

    They are on disk before they replace files of the same names. The file called `last` is moved
    after all others. If the block raises, `folder` is unchanged.

    Raises:
        UserError: a file cannot be written or moved.
    """
    folder = Path(folder)
    temporary = _temporary_name(folder / last)
    _make_parent(temporary)
    remove_dead_folders(folder)
    try:
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
            fsync(file)
            file.replace(folder / file.name)
        fsync(folder)
    except OSError as error:
        raise _explained(error, folder / last) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """Delete a folder, if it exists. Readers see it whole or not at all, even if this is killed."""
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        path.rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _explained(error, path, "remove") from error


def remove_file(path: str | Path) -> None:
    """Delete a file, if it exists."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise _explained(error, Path(path), "remove") from error


def rename_file(path: str | Path, new: str | Path) -> None:
    """Rename a file or folder, replacing a file called `new`. Make its new folder if needed."""
    _make_parent(Path(new))
    try:
        Path(path).rename(new)
    except OSError as error:
        raise _explained(error, Path(path), "rename") from error


def remove_dead_folders(parent: str | Path) -> None:
    """Delete temporary folders in `parent` that were not written to for an hour.

    Killed processes left them.
    """
    for folder in Path(parent).glob(f"{TEMPORARY_PREFIX}*/"):
        with suppress(FileNotFoundError):  # its writer renamed it meanwhile
            written = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - written > _DEAD_AFTER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: str | Path, data: bytes | memoryview, check: Check | None = None) -> None:
    """Write a whole file in one step, unless `check` raises."""
    with new_file(path, check) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 text file in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, record: dict[str, Any], check: Check | None = None) -> None:
    """Write a record of plain values in one step, unless `check` raises.

    The keys `checksum` and `above` are added, and replaced if the record has them.
    """
    body = {key: value for key, value in record.items() if key not in _CHECKSUMS}
    whole = {**body, "checksum": fingerprint(body)}
    text = json.dumps(whole, indent=1, ensure_ascii=False).removesuffix("\n}").encode("utf-8")
    write_bytes(path, text + _END % hashlib.sha256(text).hexdigest().encode("ascii"), check)


def read_json(path: str | Path) -> dict[str, Any]:
    """Return a record that `write_json` wrote, without its checksums.

    Its text may have been reformatted since, but no value changed.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: it cannot be read, or is not as it was written.
    """
    try:
        text = Path(path).read_bytes()
        record = json.loads(text.decode("utf-8"))
        above = text[: -len(_END % _NO_SHA256)]
        as_written = text == above + _END % hashlib.sha256(above).hexdigest().encode("ascii")
        checksum, _ = record.pop("checksum"), record.pop("above")
        if as_written or checksum == fingerprint(record):
            return record
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(
            f"{path} cannot be read: {error.strerror}; restore or delete it and run again"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    raise Damaged(f"{path} is damaged (its checksum differs); delete it and run again")


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a plain value's canonical JSON: equal for equal values."""
    return text_sha256(canonical(value))


def canonical(value: Any) -> str:
    """Return the canonical JSON text of a plain value, which `fingerprint` hashes."""
    return _CANONICAL.encode(value)


def canonical_table(texts: Mapping[str, str]) -> str:
    """Return `canonical` of a table, given that of each value. Keys need no escape in JSON."""
    return "{" + ",".join([f'"{key}":{texts[key]}' for key in sorted(texts)]) + "}"


def text_sha256(text: str) -> str:
    """Return the SHA-256 of ASCII text."""
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_name(path: Path) -> Path:
    # with host and random part, since two nodes may write the same path at once
    return path.parent / f"{TEMPORARY_PREFIX}{socket.gethostname()}-{uuid.uuid4().hex}"


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explained(error, path) from error


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unreadable(error: OSError, folder: Path) -> UserError:
    """Return the error for a folder that exists and whose names cannot be read."""
    return UserError(f"cannot read {folder}: {_reason(error)}; check its file system and run again")


def _explained(error: OSError, path: Path, verb: str = "write") -> UserError:
    advice = "free space or fix permissions, run again"
    return UserError(f"cannot {verb} {path}: {_reason(error)}; {advice}")


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
