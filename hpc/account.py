"""Users without an account, as containers have: a number, but neither a name nor a home."""

from __future__ import annotations

import os
import pwd
from collections.abc import MutableMapping
from pathlib import Path

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where `getpass` looks before the accounts
_NO_HOME = "/nonexistent"  # what Debian gives accounts without one; nobody can make files there


def user_name(number: int) -> str:
    """Return the name of a user, or the number itself if there is no such account."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def expanded(text: str | Path) -> Path:
    """Return a path in which `~` and `~NAME` are homes. It stays as it is if there is no such user,
    as in a shell."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def ensure_account(environ: MutableMapping[str, str] = os.environ) -> None:
    """Give this process, and those that it starts, a name and a home if they have none. Libraries
    ask for them as they are imported: torch raises without a name, and others make a folder `~`."""
    if any(environ.get(name) for name in _NAMES) and environ.get("HOME"):
        return
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        if not any(environ.get(name) for name in _NAMES):
            environ["USER"] = str(os.getuid())
        if not environ.get("HOME"):
            environ["HOME"] = _NO_HOME
