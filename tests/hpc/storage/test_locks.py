"""A lock keeps other processes out; a file system without locks is reported in one line."""

from __future__ import annotations

import errno
import fcntl

import pytest

from hpc.cli import UserError
from hpc.scheduler.local_jobs import LocalJobs
from hpc.storage.locks import require_locks, take_lock
from hpc.storage.node_cache import cached_copy
from pipeline.submission.submitter import one_at_a_time


@pytest.fixture
def without_locks(monkeypatch):
    """Make locks fail as on a file system without them."""

    def fails_with(number):
        def flock(_file, _operation):
            raise OSError(number, "as the kernel says")

        monkeypatch.setattr(fcntl, "flock", flock)

    return fails_with


def test_a_lock_is_held_until_its_file_is_closed(tmp_path):
    with (tmp_path / "lock").open("w") as one, (tmp_path / "lock").open("a") as other:
        assert take_lock(one) and not take_lock(other)
        one.close()
        assert take_lock(other, wait=True)


REASONS = {
    errno.ENOSYS: "Function not implemented",
    errno.EOPNOTSUPP: "Operation not supported",
    errno.ENOLCK: "No locks available",
}


@pytest.mark.parametrize("number", REASONS)
def test_a_file_system_without_locks_is_one_line_with_the_folder_and_what_to_do(
    without_locks, tmp_path, number
):
    without_locks(number)
    said = rf"^cannot lock a file in {tmp_path} \({REASONS[number]}\); have the file system mounted"
    for waits in (False, True):
        with (
            (tmp_path / "lock").open("w") as file,
            pytest.raises(UserError, match=f"{said} with file locks .Lustre: `-o flock`; NFS: "),
        ):
            take_lock(file, wait=waits)


USERS = {
    "submission": one_at_a_time,
    "local jobs": lambda folder: LocalJobs(folder).locked(),
    "runner": lambda folder: LocalJobs(folder).runner_lock(),
}


@pytest.mark.parametrize("user", USERS)
def test_every_user_of_a_lock_reports_that_there_are_none(without_locks, tmp_path, user):
    without_locks(errno.ENOSYS)
    with (
        pytest.raises(UserError, match=f"cannot lock a file in {tmp_path} .*run_dir"),
        USERS[user](tmp_path),
    ):
        pass


def test_without_locks_no_copy_is_made_on_a_node(without_locks, tmp_path, capsys):
    without_locks(errno.ENOLCK)
    with cached_copy(tmp_path, [], "key", str(tmp_path)) as folder:
        assert folder == tmp_path
    said = capsys.readouterr().err
    assert said.startswith(f"warning: cannot lock a file in {tmp_path}") and "node_local" in said


# --- the doctor's check -------------------------------------------------------------------------


def test_locks_that_keep_others_out_pass_and_leave_nothing(tmp_path):
    assert require_locks(tmp_path) == f"a lock in {tmp_path} keeps another process out"
    assert not list(tmp_path.iterdir())


def test_locks_that_are_missing_or_let_others_in_do_not_pass(without_locks, monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "flock", lambda _file, _operation: None)
    with pytest.raises(UserError, match=r"two processes could lock one file in .* at once"):
        require_locks(tmp_path)
    without_locks(errno.ENOSYS)
    with pytest.raises(UserError, match="cannot lock a file in "):
        require_locks(tmp_path)
    with pytest.raises(UserError, match=r"cannot write into .*: No such file or directory; free"):
        require_locks(tmp_path / "missing")
    assert not list(tmp_path.iterdir())
