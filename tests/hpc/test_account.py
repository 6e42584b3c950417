"""A user needs neither an account nor a home, as in a container."""

import pwd
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from hpc.account import ensure_account, expanded, user_name

NOBODY = 54321
AS_NOBODY = ("unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}", "env", "-i")


@cache
def may_be_nobody() -> bool:
    try:
        return subprocess.run([*AS_NOBODY, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not may_be_nobody(), reason="no user namespaces with an id of choice here")
def test_training_can_be_imported():
    code = "import os, jobs.train; print(os.getuid(), os.environ['USER'], os.environ['HOME'])"
    done = subprocess.run(
        [*AS_NOBODY, sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"{NOBODY} {NOBODY} /nonexistent\n", "")


def test_a_user_with_name_and_home_keeps_them():
    environ = {"LOGNAME": "me", "HOME": "/people/me"}
    ensure_account(environ)
    assert environ == {"LOGNAME": "me", "HOME": "/people/me"}


def test_a_home_of_an_unknown_user_is_not_expanded():
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert expanded("~root") == Path(pwd.getpwnam("root").pw_dir)


def test_the_name_of_a_user_without_an_account_is_the_number():
    assert user_name(0) == "root"
    assert user_name(NOBODY) == str(NOBODY)
