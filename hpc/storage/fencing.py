"""Fencing tokens: keep a process that was superseded from writing.

Every start of a job claims the next generation number for the entries that it will write. Before
it publishes or deletes, it looks for a higher claim on any of them. A superseded process stops at
its next check. A rename directly after a check can still happen.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpc.cli import UserError
from hpc.storage.atomic import Damaged, unreadable


class Superseded(UserError):
    """A later start has claimed an entry that this process was about to write."""


@dataclass(frozen=True)
class Generation:
    """A claim: its number in `folder`, and the names of the entries it covers."""

    folder: Path
    number: int
    entries: frozenset[str]

    def is_superseded(self) -> bool:
        """Return whether a later claim shares an entry, or the folder of claims was deleted.

        Raises:
            UserError: the folder cannot be read.
        """
        try:
            later = [n for n in _numbers(self.folder) if n > self.number]
        except FileNotFoundError:
            return True
        except OSError as error:
            raise unreadable(error, self.folder) from error
        return any(not self.entries.isdisjoint(_entries(self.folder / str(n))) for n in later)

    def check(self) -> None:
        """Raise `Superseded` if `is_superseded`."""
        if self.is_superseded():
            raise Superseded(
                f"a later start has taken over: generation {self.number} in {self.folder} has a "
                "successor; this process ends and leaves everything as it is"
            )


def claim(folder: Path, entries: Iterable[str]) -> Generation:
    """Claim the next number in `folder` for `entries`. No two processes get the same number.

    Raises:
        UserError: the folder cannot be written to.
    """
    names = frozenset(entries)
    draft = folder / f".tmp-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(sorted(names)), encoding="utf-8")
        number = max(_numbers(folder), default=0) + 1
        while True:
            try:
                os.link(draft, folder / str(number))  # exclusive, and never half written
                return Generation(folder, number, names)
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror}; free space or fix permissions, "
            "run again"
        ) from error
    finally:
        with suppress(OSError):
            draft.unlink()


def _numbers(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def _entries(path: Path) -> frozenset[str]:
    try:
        return frozenset(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        # nobody can tell which entries it covers, so it may cover ours
        raise Damaged(f"the claim {path} is damaged; delete it and run grid again") from error
