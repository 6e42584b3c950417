"""Folders that nobody else can write to. submitit unpickles what lies in its folder, and a job
is a command: whoever can write there, or put another folder in the place of one above, runs code
as the user.

Owners and mode bits decide, and POSIX access lists: their mask shows as the group's bits, so only
where a trusted group may write can an entry for somebody else hide. NFSv4 lists are the server's
affair, which shows in the mode bits what they grant. Whoever owns a folder above that nobody else
can write to administers the place, as root does, and is not refused. In a user namespace, as
containers without root make, the machine's root shows as the overflow user, who may therefore own a
sticky folder above, such as /tmp or /scratch.
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
_MOST_LINKS = 40
_ELSEWHERE = "choose another folder"


def private_folder(
    path: str | Path, group: str = "", *, keep_readable: bool = False, remedy: str = _ELSEWHERE
) -> None:
    """Make `path` a folder of mode 0700, or 2770 for `group`, whatever the umask. An existing one
    of ours is closed to the others; with `keep_readable` they may go on reading it.

    Raises `UserError` as `require_private` does, and where the folder cannot be made.
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
    """Raise `UserError` if anybody but this user, root and the members of `group` can write into
    the folder `path` or replace it. It may be missing: then the folders above it count. Changes
    nothing."""
    trusted = _trusted(os.geteuid(), group)
    writers: dict[Path, str] = {}
    for place in _way(Path(path).absolute()):
        info = place.lstat()
        ours = info.st_uid in (0, os.geteuid())
        # what lies among other people's things may be renamed or removed by its owner
        if writers.get(place.parent) and not (ours or _is_of_group(info, group)):
            raise _not_ours(place, info, remedy)
        if stat.S_ISLNK(info.st_mode):
            continue
        writers[place] = _writers(place, info, trusted)
        administered = ours or info.st_uid == _outer_root()
        if writers[place] and not (administered and info.st_mode & stat.S_ISVTX):
            raise _open_to_others(place, info, writers[place], remedy)
    real = Path(os.path.realpath(path))
    if real.exists():
        if real not in writers:  # somebody made it while we looked
            return require_private(path, group, remedy)
        info = real.stat()
        if writers[real]:
            raise _open_to_others(real, info, writers[real], remedy)
        if info.st_uid != os.geteuid() and not _is_of_group(info, group):
            raise _not_ours(real, info, remedy)
    return None


def restrict_umask(group: str = "") -> None:
    """What this process and those it starts write from now on, nobody else may change; with
    `group` its members may, and the others see nothing. Slurm hands the umask on to jobs."""
    os.umask(0o007 if group else os.umask(0o077) | 0o022)


def group_number(group: str) -> int | None:
    """The id of a Unix group; None for the name "". Raises `UserError` for one that does not exist
    or that this user is not in."""
    if not group:
        return None
    own = {os.getegid(), *os.getgroups()}
    try:
        number = grp.getgrnam(group).gr_gid
    except KeyError:
        number = -1
    if number not in own:
        names = ", ".join(sorted(map(_group_name, own)))
        what = "is a group you are not in" if number >= 0 else "is no Unix group"
        raise UserError(f"[cluster]: group = {group!r} {what}; yours: {names}")
    return number


@lru_cache
def _trusted(user: int, group: str) -> frozenset[int]:
    """Groups that may write: root's, the given one, and the one that many systems make for each
    user, who is alone in it."""
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
    """Return the user id as which a user namespace shows the machine's root; None outside one."""
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):  # no Linux
        return None


def _way(path: Path) -> Iterator[Path]:
    """Every folder and link that one passes from / to `path`, as far as they exist."""
    place, ahead = Path("/"), list(reversed(path.parts[1:]))
    yield place
    links = 0
    while ahead:
        part = ahead.pop()
        place = place.parent if part == ".." else place / part
        if not os.path.lexists(place):
            return
        yield place
        if place.is_symlink():
            links += 1
            if links > _MOST_LINKS:
                raise UserError(f"{path}: its symbolic links lead nowhere; choose another folder")
            target = place.readlink()
            place = Path("/") if target.is_absolute() else place.parent
            ahead += reversed(target.parts[target.is_absolute() :])


def _is_of_group(info: os.stat_result, group: str) -> bool:
    return bool(group and info.st_gid == group_number(group) and info.st_mode & stat.S_ISGID)


def _writers(place: Path, info: os.stat_result, trusted: frozenset[int]) -> str:
    """Who else may write: empty for nobody."""
    if info.st_mode & stat.S_IWOTH:
        return "everybody"
    if not info.st_mode & stat.S_IWGRP:
        return ""
    if info.st_gid not in trusted:
        return f"the group {_group_name(info.st_gid)}"
    try:
        entries = os.getxattr(place, _ACCESS_LIST)[4:]  # after the version
    except OSError:  # no list, or a file system without them
        return ""
    for kind, rights, number in struct.iter_unpack("<HHI", entries):
        if kind == _ACL_USER and rights & _ACL_WRITE and number not in (0, os.geteuid()):
            return f"the user {user_name(number)}"
        if kind == _ACL_GROUP and rights & _ACL_WRITE and number not in trusted:
            return f"the group {_group_name(number)}"
    return ""


def _open_to_others(place: Path, info: os.stat_result, whom: str, remedy: str) -> UserError:
    name = shlex.quote(str(place))
    mend = f"make sure that all in it is yours and run `chmod go-w {name}`"
    if info.st_uid != os.geteuid():
        mend = f"ask {user_name(info.st_uid)} to run `chmod +t {name}`"
    name_of_group = whom.removeprefix("the group ")
    trust = "" if name_of_group == whom else f", or set group = {name_of_group!r} in [cluster]"
    return UserError(
        f"{place} can be written to by {whom}, who could put there what your jobs run; "
        f"{remedy}{trust}, or {mend}"
    )


def _not_ours(place: Path, info: os.stat_result, remedy: str) -> UserError:
    me = user_name(os.geteuid())
    return UserError(
        f"{place} belongs to {user_name(info.st_uid)}, who could put there what your jobs run; "
        f"{remedy}, or make it yours: `chown -hR {me} {shlex.quote(str(place))}`"
    )


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
