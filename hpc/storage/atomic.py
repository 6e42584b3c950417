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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpc.cli import UserError

TEMPORARY_PREFIX = ".tmp-"
_DEAD_AFTER_SECONDS = 3600.0  # since a temporary folder or anything in it was last written
# A record's last line holds the hash of the bytes above it, which is compared in no time, and saves
# writing the record anew for its checksum.
_END = b',\n "above": "%s"\n}\n'
_NO_SHA256 = b"0" * 64
_CHECKSUMS = frozenset({"checksum", "above"})
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)
# Asked when all is on disk, right before it appears: raises if it must not appear any more.
Check = Callable[[], None]


class Damaged(UserError):
    """A file that exists but whose content is not what was written."""


@contextmanager
def new_file(
    path: str | Path, check: Check | None = None, final: Callable[[], Path] | None = None
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an error the file written
    there becomes `path` in one step, replacing an older one. On an error, or if `check` raises,
    nothing is left. `final`: returns, after the block, the path to use in place of `path`; it must
    lie in the same folder.
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
        with suppress(OSError):  # there may be none; and one on a disk that is read-only by now
            temporary.unlink()


@contextmanager
def new_folder(path: str | Path, check: Check | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` by one rename, unless `check` raises. `path`
    must not exist yet: if it does, `FileExistsError`, and the older one stays untouched.
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
        if error.errno == errno.ENOTEMPTY:  # another writer was quicker than our look
            raise FileExistsError(f"{path} exists already") from error
        raise _explained(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_files(folder: str | Path, last: str) -> Iterator[Path]:
    """Yield a temporary folder in `folder`; when the block ends without an error, its files replace
    those of the same names in `folder`, the one called `last` after all others. On an error nothing
    of `folder` has changed.
    """
    folder = Path(folder)
    temporary = _temporary_name(folder / last)
    _make_parent(temporary)
    remove_dead_folders(folder)
    try:
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
            file.replace(folder / file.name)
        fsync(folder)
    except OSError as error:
        raise _explained(error, folder / last) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """Delete a folder so that readers see it whole or not at all, even if we are killed meanwhile;
    nothing happens where there is none."""
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        path.rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _explained(error, path) from error


def remove_file(path: str | Path) -> None:
    """Delete a file; nothing happens where there is none."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise _explained(error, Path(path)) from error


def rename_file(path: str | Path, new: str | Path) -> None:
    """Give a file or folder another name, replacing a file that has it; its new folder is made
    where there is none."""
    _make_parent(Path(new))
    try:
        Path(path).rename(new)
    except OSError as error:
        raise _explained(error, Path(path)) from error


def remove_dead_folders(parent: str | Path) -> None:
    """Delete the temporary folders that killed processes left in `parent`: those to which nothing
    was written for an hour."""
    for folder in Path(parent).glob(f"{TEMPORARY_PREFIX}*/"):
        with suppress(FileNotFoundError):  # its writer has just renamed it
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
    """Write a record of plain values, with checksums of itself under the keys `checksum` and
    `above`, which no record has of its own, unless `check` raises."""
    body = {key: value for key, value in record.items() if key not in _CHECKSUMS}
    whole = {**body, "checksum": fingerprint(body)}
    text = json.dumps(whole, indent=1, ensure_ascii=False).removesuffix("\n}").encode("utf-8")
    write_bytes(path, text + _END % hashlib.sha256(text).hexdigest().encode("ascii"), check)


def read_json(path: str | Path) -> dict[str, Any]:
    """A record that `write_json` wrote, without its checksum. It may be laid out anew since, but
    not changed.

    Raises `FileNotFoundError` if there is none and `Damaged` if it is not as it was written.
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
            f"{path} cannot be read: {error.strerror}; mend or delete it and run again"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    raise Damaged(f"{path} is damaged (its checksum does not fit); delete it and run again")


def fingerprint(value: Any) -> str:
    """SHA-256 of a value of plain types in canonical JSON: equal values, equal fingerprints."""
    return text_sha256(canonical(value))


def canonical(value: Any) -> str:
    """The JSON text that `fingerprint` is the hash of."""
    return _CANONICAL.encode(value)


def canonical_table(texts: Mapping[str, str]) -> str:
    """`canonical` of a table from those of its values, by plain keys."""
    return "{" + ",".join([f'"{key}":{texts[key]}' for key in sorted(texts)]) + "}"


def text_sha256(text: str) -> str:
    """SHA-256 of ASCII text."""
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


def fsync(path: Path) -> None:
    """Bring a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, path: Path) -> UserError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return UserError(f"cannot write {path}: {reason}; make room or mend permissions, run again")
