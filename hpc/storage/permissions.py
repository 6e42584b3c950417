"""Make and require folders that no other user can write to.

submitit unpickles the files in its folder, and a local job is a command. Another user who can write
there, or replace a parent folder, can run code as this user.

Owners, mode bits and POSIX access lists decide:
- With a POSIX access list, the group bits show its mask. If they deny writing, no entry can grant
  it. So entries are read only where the group bits allow writing.
- The server applies NFSv4 access lists, and shows in the mode bits what they grant.
- The owner of a parent folder that no other user can write to is trusted, as root is.
- In a user namespace (containers without root) the machine's root shows as the overflow user. So
  that user may own a sticky parent folder, such as /tmp or /scratch.
"""

from __future__ import annotations

import grp
import os
import pwd
import shlex
import stat
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from hpc.account import user_name
from hpc.cli import UserError

_ACCESS_LIST = "system.posix_acl_access"
_ACL_USER, _ACL_GROUP, _ACL_WRITE = 2, 8, 2
_MAX_LINKS = 40
_ELSEWHERE = "choose another folder"


def private_folder(
    path: str | Path, group: str = "", *, keep_readable: bool = False, remedy: str = _ELSEWHERE
) -> None:
    """Make `path` a folder of mode 0700, or 2770 for `group`, whatever the umask.

    Args:
        path: the folder, with parents that may be missing.
        group: a Unix group that may read and write; "" for none.
        keep_readable: let other users go on reading a folder that exists and is ours.
        remedy: the advice at the end of an error message.

    Raises:
        UserError: the folder cannot be made, or as `require_private`.
    """
    require_private(path, group, remedy)
    number = group_number(group)
    real = Path(os.path.realpath(path))
    mode = 0o700 if number is None else 0o2770
    try:
        for missing in reversed([p for p in real.parents if not p.exists()]):
            missing.mkdir(0o755, exist_ok=True)
        if not real.is_dir():
            real.mkdir(0o700)
            keep_readable = False
        info = real.stat()
        if info.st_uid == os.geteuid():
            if number is not None and info.st_gid != number:
                os.chown(real, -1, number)
            found = stat.S_IMODE(info.st_mode)
            wanted = found | mode & 0o2070 if keep_readable else mode
            if wanted != found:
                real.chmod(wanted)
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}; {remedy}") from error
    require_private(path, group, remedy)  # some file systems keep neither owner nor mode


def require_private(path: str | Path, group: str = "", remedy: str = _ELSEWHERE) -> None:
    """Refuse a folder that others than this user, root and the members of `group` can write to.

    The folder may be missing: then only its parents count. Nothing is changed.

    Raises:
        UserError: another user can write into the folder, or replace it.
    """
    trusted = _trusted(os.geteuid(), group)
    writers: dict[Path, str] = {}
    for entry in _folders_on_the_way(Path(path).absolute()):
        info = entry.lstat()
        ours = info.st_uid in (0, os.geteuid())
        # its owner may rename or remove it in a folder that others can write to
        if writers.get(entry.parent) and not (ours or _is_of_group(info, group)):
            raise _not_ours(entry, info, remedy)
        if stat.S_ISLNK(info.st_mode):
            continue
        writers[entry] = _writers(entry, info, trusted)
        administered = ours or info.st_uid == _outer_root()
        if writers[entry] and not (administered and info.st_mode & stat.S_ISVTX):
            raise _open_to_others(entry, info, writers[entry], remedy)
    real = Path(os.path.realpath(path))
    if real.exists():
        if real not in writers:  # another process has made it meanwhile
            return require_private(path, group, remedy)
        info = real.stat()
        if writers[real]:
            raise _open_to_others(real, info, writers[real], remedy)
        if info.st_uid != os.geteuid() and not _is_of_group(info, group):
            raise _not_ours(real, info, remedy)
    return None


def restrict_umask(group: str = "") -> None:
    """Set the umask so that other users cannot change the files that this process writes.

    With `group`, its members can change them and others cannot read them. Child processes inherit
    the umask, and Slurm hands it on to jobs.
    """
    os.umask(0o007 if group else os.umask(0o077) | 0o022)


def group_number(group: str) -> int | None:
    """Return the id of a Unix group; None for the name "".

    Raises:
        UserError: the group does not exist, or this user is not in it.
    """
    if not group:
        return None
    own = {os.getegid(), *os.getgroups()}
    try:
        number = grp.getgrnam(group).gr_gid
    except KeyError:
        number = -1
    if number not in own:
        names = ", ".join(sorted(map(_group_name, own)))
        what = "is a group you are not in" if number >= 0 else "is not a Unix group"
        raise UserError(f"[cluster]: group = {group!r} {what}; yours: {names}")
    return number


@lru_cache
def _trusted(user: int, group: str) -> frozenset[int]:
    """Return the groups that may write: root's, `group`, and the user's private group, if any."""
    given = group_number(group)
    trusted = {0} if given is None else {0, given}
    try:
        account = pwd.getpwuid(user)
        own = grp.getgrgid(account.pw_gid)
        if own.gr_name == account.pw_name and set(own.gr_mem) <= {account.pw_name}:
            trusted.add(own.gr_gid)
    except KeyError:  # no such account: a container's user
        pass
    return frozenset(trusted)


@lru_cache
def _outer_root() -> int | None:
    """Return the id that stands for the machine's root in a user namespace; None outside one."""
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):  # no Linux
        return None


def _folders_on_the_way(path: Path) -> Iterator[Path]:
    """Yield every existing folder and link on the way from / to `path`."""
    entry, ahead = Path("/"), list(reversed(path.parts[1:]))
    yield entry
    links = 0
    while ahead:
        part = ahead.pop()
        entry = entry.parent if part == ".." else entry / part
        if not os.path.lexists(entry):
            return
        yield entry
        if entry.is_symlink():
            links += 1
            if links > _MAX_LINKS:
                raise UserError(f"{path}: its symbolic links lead nowhere; choose another folder")
            target = entry.readlink()
            entry = Path("/") if target.is_absolute() else entry.parent
            ahead += reversed(target.parts[target.is_absolute() :])


def _is_of_group(info: os.stat_result, group: str) -> bool:
    return bool(group and info.st_gid == group_number(group) and info.st_mode & stat.S_ISGID)


def _writers(entry: Path, info: os.stat_result, trusted: frozenset[int]) -> str:
    """Return which other users may write, as a phrase; "" if none."""
    if info.st_mode & stat.S_IWOTH:
        return "everybody"
    if not info.st_mode & stat.S_IWGRP:
        return ""
    if info.st_gid not in trusted:
        return f"the group {_group_name(info.st_gid)}"
    try:
        entries = os.getxattr(entry, _ACCESS_LIST)[4:]  # after the version
    except OSError:  # no list, or a file system without them
        return ""
    for kind, rights, number in struct.iter_unpack("<HHI", entries):
        if kind == _ACL_USER and rights & _ACL_WRITE and number not in (0, os.geteuid()):
            return f"the user {user_name(number)}"
        if kind == _ACL_GROUP and rights & _ACL_WRITE and number not in trusted:
            return f"the group {_group_name(number)}"
    return ""


def _open_to_others(entry: Path, info: os.stat_result, whom: str, remedy: str) -> UserError:
    name = shlex.quote(str(entry))
    fix = f"make sure that all in it is yours and run `chmod go-w {name}`"
    if info.st_uid != os.geteuid():
        fix = f"ask {user_name(info.st_uid)} to run `chmod +t {name}`"
    name_of_group = whom.removeprefix("the group ")
    trust = "" if name_of_group == whom else f", or set group = {name_of_group!r} in [cluster]"
    return UserError(
        f"{entry} can be written to by {whom}, who could change what your jobs run; "
        f"{remedy}{trust}, or {fix}"
    )


def _not_ours(entry: Path, info: os.stat_result, remedy: str) -> UserError:
    me = user_name(os.geteuid())
    return UserError(
        f"{entry} belongs to {user_name(info.st_uid)}, who could change what your jobs run; "
        f"{remedy}, or make it yours: `chown -hR {me} {shlex.quote(str(entry))}`"
    )


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
