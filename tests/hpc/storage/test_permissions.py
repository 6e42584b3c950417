"""Other users cannot write to the folders of pickles and local jobs.

Other users are real: the test takes their ids and tries.
"""

import grp
import os
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import pytest

from hpc.cli import UserError
from hpc.scheduler.cluster_profile import ClusterProfile
from hpc.scheduler.local import LocalQueue
from hpc.scheduler.local_jobs import LocalJobs
from hpc.scheduler.slurm import SlurmQueue
from hpc.storage.permissions import group_number, private_folder, require_private, restrict_umask
from tests.hpc.scheduler.test_slurm import FakeSlurm
from tests.other_user import as_user

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users too")

REPOSITORY = Path(__file__).parents[3]
EVE, EVES_GROUP, BOB, SHARED = 4242, 4343, 7, "users"
SHARED_ID = grp.getgrnam(SHARED).gr_gid


@pytest.fixture
def place():
    """A folder that every user may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def same_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def folder(path, mode, user=0, group=0) -> Path:
    path.mkdir(exist_ok=True)
    os.chown(path, user, group)
    path.chmod(mode)
    return path


def mode_of(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def plant(run):
    """Try to put a pickle into a run directory, or another directory in its place."""

    def attack():
        try:
            (run / "1_submitted.pkl").write_text("evil")
        except OSError:
            run.rename(run.with_name("away"))
            run.mkdir()

    return attack


LEAVES = list(product((0o700, 0o755, 0o770, 0o777, 0o1777, 0o2775), (0, EVE, BOB), (0, EVES_GROUP)))
ABOVE = [
    (mode, user, group)
    for mode, user, group in product(
        (0o755, 0o775, 0o777, 0o1777, 0o1775), (0, EVE), (0, EVES_GROUP)
    )
    # the owner of a parent folder that no other user can write to administers it
    if user == 0 or mode & 0o002 or (mode & 0o020 and group == EVES_GROUP)
]


def test_a_folder_is_refused_if_and_only_if_another_user_can_write_to_it(place):
    """Try every combination of modes and owners of two folders, as two users."""
    refused = accepted = 0
    for above, run in product(ABOVE, LEAVES):
        outer = folder(place / "outer", *above)
        inner = folder(outer / "run", *run)
        try:
            require_private(inner)
        except UserError as error:
            told = str(error)
        else:
            told = ""
        reached = any(
            as_user(user, groups, plant(inner))
            for user, groups in ((EVE, [EVES_GROUP]), (BOB, [9999]))
        )
        assert reached == bool(told), (oct(above[0]), above, oct(run[0]), run, told)
        refused, accepted = refused + bool(told), accepted + (not told)
        shutil.rmtree(outer)
    print(f"{refused} refused, {accepted} accepted")
    assert refused > 400 and accepted > 40


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_folder_is_private_whatever_the_umask(place, umask):
    os.umask(umask)
    private_folder(place / "runs" / "mine")
    assert mode_of(place / "runs" / "mine") == 0o700
    assert mode_of(place / "runs") == 0o755 & ~umask
    assert not as_user(EVE, [EVES_GROUP], lambda: list((place / "runs" / "mine").iterdir()))


def test_an_own_folder_that_others_may_read_is_closed_only_where_pickles_lie(place):
    run = folder(place / "run", 0o755)
    private_folder(run, keep_readable=True)
    assert mode_of(run) == 0o755
    private_folder(run)
    assert mode_of(run) == 0o700


@pytest.mark.parametrize(
    ("mode", "user", "group", "said"),
    [
        (0o777, 0, 0, "can be written to by everybody"),
        (0o1777, 0, 0, "can be written to by everybody"),
        (0o775, 0, SHARED_ID, "can be written to by the group users"),
        (0o755, EVE, 0, "belongs to 4242"),
        (0o700, 65534, 0, "belongs to nobody"),
    ],
)
def test_the_message_names_the_other_user_and_a_remedy(place, mode, user, group, said):
    run = folder(place / "a run's $(touch x)\n", mode, user, group)
    with pytest.raises(UserError) as refused:
        private_folder(run, remedy="set run_dir to a folder of yours")
    told = str(refused.value)
    assert told.startswith(f"{run} {said}, who could change what your jobs run; set run_dir")
    assert ("or set group = 'users' in [cluster]" in told) == (group == SHARED_ID)
    fix = re.search(r"`(.*)`", told, re.DOTALL)[1]
    subprocess.run(["/bin/sh", "-c", fix], check=True, cwd=place)
    require_private(run)
    assert [path.name for path in place.iterdir()] == [run.name]  # no file x


def test_a_folder_above_that_others_may_write_to_is_refused_unless_it_is_sticky(place):
    above = folder(place / "above", 0o777)
    with pytest.raises(UserError, match=rf"{above} can be written to by everybody"):
        private_folder(above / "deep" / "run")
    assert list(above.iterdir()) == []
    above.chmod(0o1777)
    private_folder(above / "deep" / "run")
    os.chown(above / "deep", EVE, 0)  # among things of others, its owner could rename it
    with pytest.raises(UserError, match=rf"{above}/deep belongs to {EVE}"):
        require_private(above / "deep" / "run")


def test_links_are_followed_and_their_own_folders_count(place):
    private_folder(place / "real")
    shared = folder(place / "shared", 0o1777)
    (shared / "mine").symlink_to("../real")
    private_folder(shared / "mine" / ".." / "real" / "run")
    assert mode_of(place / "real" / "run") == 0o700
    os.lchown(shared / "mine", EVE, 0)  # who may point it elsewhere once we have looked
    with pytest.raises(UserError, match=rf"{shared}/mine belongs to {EVE}"):
        require_private(shared / "mine" / "run")
    (place / "open").symlink_to(folder(place / "target", 0o777))
    with pytest.raises(UserError, match=rf"{place}/target can be written to by everybody"):
        require_private(place / "open" / "run")
    (place / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="symbolic links lead nowhere"):
        require_private(place / "loop" / "run")


def test_a_file_in_place_of_a_folder_is_one_line(place):
    (place / "notes").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write into .*/notes: File exists; choose another"):
        private_folder(place / "notes")


def test_an_access_list_cannot_hide_a_writer(place):
    """The list lets root's own group write, which is trusted, and Eve."""
    run = folder(place / "run", 0o770)
    require_private(run)
    entries = [(1, 7, -1), (2, 7, EVE), (4, 7, -1), (0x10, 7, -1), (0x20, 0, -1)]
    packed = b"".join(struct.pack("<HHI", kind, bits, n & 0xFFFFFFFF) for kind, bits, n in entries)
    try:
        os.setxattr(run, "system.posix_acl_access", struct.pack("<I", 2) + packed)
    except OSError:
        pytest.skip("no access lists on this file system")
    assert as_user(EVE, [EVES_GROUP], plant(run))
    with pytest.raises(UserError, match=f"can be written to by the user {EVE}"):
        require_private(run)
    private_folder(place / "other")
    run.chmod(0o700)  # takes the right from every entry
    require_private(run)


def test_the_profiles_group_shares_a_run_and_nobody_else(place):
    """One member submits, and another resumes the same run."""

    def work():
        restrict_umask(SHARED)
        private_folder(place / "run", SHARED, keep_readable=True)
        jobs = LocalJobs(place / "run" / "queue", SHARED)
        with jobs.locked():
            jobs.add([{"module": "m", "arguments": []}])

    folder(place, 0o1777)
    assert as_user(EVE, [EVES_GROUP, SHARED_ID], work)
    assert mode_of(place / "run") == mode_of(place / "run" / "queue") == 0o2770
    assert as_user(BOB, [9999, SHARED_ID], work)
    local_jobs = sorted((place / "run" / "queue").glob("*.json"))
    assert [job.stat().st_uid for job in local_jobs] == [EVE, BOB]
    assert {mode_of(job) for job in local_jobs} == {0o660}
    assert {job.stat().st_gid for job in local_jobs} == {SHARED_ID}
    assert not as_user(8, [9998], lambda: list((place / "run").iterdir()))

    def refused_without_the_group():
        with pytest.raises(UserError, match="belongs to 4242"):
            require_private(place / "run")

    assert as_user(BOB, [9999, SHARED_ID], refused_without_the_group)


def test_an_own_run_is_opened_to_the_profiles_group(place):
    private_folder(place / "run")

    def share():
        private_folder(place / "run", SHARED, keep_readable=True)

    os.chown(place / "run", EVE, EVES_GROUP)
    assert as_user(EVE, [EVES_GROUP, SHARED_ID], share)
    assert mode_of(place / "run") == 0o2770
    assert (place / "run").stat().st_gid == SHARED_ID


def test_an_unknown_group_or_one_without_this_user_is_refused(place):
    for name, what in (("no such", "is not a Unix group"), (SHARED, "is a group you are not in")):
        with pytest.raises(UserError, match=rf"\[cluster\]: group = '{name}' {what}; yours: "):
            private_folder(place / "run", name)
    assert list(place.iterdir()) == []
    assert group_number("") is None


@pytest.mark.parametrize(("umask", "after"), [(0o000, 0o022), (0o002, 0o022), (0o077, 0o077)])
def test_other_users_cannot_change_the_files_of_a_submission(umask, after):
    os.umask(umask)
    restrict_umask()
    assert os.umask(0) == after


@pytest.mark.parametrize("which", ["logs", "queue"])
def test_nothing_is_queued_through_a_folder_of_another_user(place, which, monkeypatch, tmp_path):
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(fake.folder / "bin"), prepend=os.pathsep)
    folder(place / which, 0o755, EVE)
    profile = ClusterProfile()
    queues = [LocalQueue(profile, place / "logs", place / "queue")]
    queues += [SlurmQueue(profile, place / "logs")] if which == "logs" else []
    for queue in queues:
        with pytest.raises(UserError, match=rf"{place}/{which} belongs to {EVE}"):
            queue.submit([], profile.single(), "job")
    assert list((place / which).iterdir()) == []


def test_a_runner_refuses_local_jobs_that_others_can_write(place):
    queue = folder(place / "queue", 0o777)
    command = [os.sys.executable, "-m", "hpc.scheduler.local", str(queue)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {queue} can be written to by everybody")
    assert done.stderr.count("\n") == 1
    assert list(queue.iterdir()) == []
    assert shlex.quote(str(queue)) in done.stderr


def test_in_a_users_namespace_the_machines_root_may_own_a_sticky_folder(place):
    """An owner without an id inside the namespace shows as the overflow user."""
    above = folder(place / "above", 0o1777, BOB)
    code = (
        "import sys; from hpc.storage.permissions import private_folder; "
        "private_folder(sys.argv[1])"
    )
    inside = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
    done = subprocess.run([*inside, above / "run"], capture_output=True, text=True, cwd=REPOSITORY)
    if done.stderr.startswith("unshare: "):
        pytest.skip(done.stderr)
    assert (done.returncode, done.stderr) == (0, "")
    above.chmod(0o777)
    done = subprocess.run([*inside, above / "run"], capture_output=True, text=True, cwd=REPOSITORY)
    assert "above can be written to by everybody" in done.stderr
    above.chmod(0o1777)
    with pytest.raises(UserError, match="can be written to by everybody"):
        require_private(above / "run")
