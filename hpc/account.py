"""Support users without an account, as in containers: no name and no home, only a number."""

from __future__ import annotations

import os
import pwd
from collections.abc import MutableMapping
from pathlib import Path

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # the variables that `getpass` reads first
_NO_HOME = "/nonexistent"  # as Debian sets for accounts without a home; cannot be written to


def user_name(number: int) -> str:
    """Return the name of a user, or the number itself if there is no such account."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def expanded(text: str | Path) -> Path:
    """Return a path with `~` and `~NAME` expanded; unchanged if there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def ensure_account(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set `USER` and `HOME` in `environ` if the user has no account.

    Libraries ask for them on import: torch raises without a name, others make a folder called `~`.
    """
    if any(environ.get(name) for name in _NAMES) and environ.get("HOME"):
        return
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        if not any(environ.get(name) for name in _NAMES):
            environ["USER"] = str(os.getuid())
        if not environ.get("HOME"):
            environ["HOME"] = _NO_HOME
