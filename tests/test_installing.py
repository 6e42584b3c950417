"""The installation of the test cluster's packages waits for apt's locks, and a machine that cannot
run a cluster says so at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parent / "cluster"
CONTROL = """Package: lossgrid-nothing
Version: 1
Architecture: all
Maintainer: nobody <nobody@example.org>
Description: an empty package
"""
APT_CONF = """Dir "{root}";
Dir::State::status "{root}/var/lib/dpkg/status";
Dir::Bin::methods "/usr/lib/apt/methods";
Dir::Bin::dpkg "/usr/bin/dpkg";
DPkg::Options {{"--root={root}"; "--force-not-root"; "--log={root}/dpkg.log";}};
APT::Sandbox::User "";
"""
FOLDERS = """var/lib/apt/lists/partial var/cache/apt/archives/partial var/lib/dpkg/updates
    var/lib/dpkg/info etc/apt/apt.conf.d etc/apt/preferences.d etc/apt/sources.list.d
    etc/apt/trusted.gpg.d var/log/apt package/DEBIAN repository"""


@pytest.fixture
def debian(tmp_path):
    """A folder that apt takes for the whole machine, with one package to install; and the
    environment that turns apt-get to it."""
    root = tmp_path / "debian"
    for folder in FOLDERS.split():
        (root / folder).mkdir(parents=True)
    (root / "var/lib/dpkg/status").touch()
    (root / "package/DEBIAN/control").write_text(CONTROL)
    file = root / "repository/nothing.deb"
    build = ["dpkg-deb", "--build", "--root-owner-group", root / "package", file]
    subprocess.run(build, check=True, capture_output=True)
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    entry = f"{CONTROL}Filename: ./nothing.deb\nSize: {len(data)}\nSHA256: {digest}\n"
    (root / "repository/Packages").write_text(entry)
    source = f"deb [trusted=yes] file:{root}/repository ./\n"
    (root / "etc/apt/sources.list").write_text(source)
    (root / "apt.conf").write_text(APT_CONF.format(root=root))
    return root, {**os.environ, "APT_CONFIG": str(root / "apt.conf")}


def install(environ, package="lossgrid-nothing", **options):
    return subprocess.Popen(
        [CLUSTER / "apt-install", package], env={**environ, **options}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def is_installed(root):
    return "lossgrid-nothing" in (root / "var/lib/dpkg/status").read_text()


needs_apt = pytest.mark.skipif(
    shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None, reason="no apt-get here"
)


@needs_apt
@pytest.mark.parametrize(
    "lock",
    ["var/lib/apt/lists/lock", "var/cache/apt/archives/lock", "var/lib/dpkg/lock-frontend"],
)
def test_a_lock_of_apt_is_waited_for(debian, lock):
    root, environ = debian
    with (root / lock).open("w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        process = install(environ)
        said = process.stderr.readline()
        assert said == "waiting for another process that holds apt's lock\n"
        assert process.poll() is None and not is_installed(root)
    _, rest = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "")
    assert is_installed(root)


@needs_apt
def test_a_lock_that_is_never_released_is_told(debian):
    root, environ = debian
    with (root / "var/lib/dpkg/lock-frontend").open("w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        process = install(environ, LOSSGRID_APT_SECONDS="1")
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    last = said.splitlines()[-1]
    assert last.startswith("error: another process has held apt's lock for 1 s: ")
    assert f"{root}/var/lib/dpkg/lock-frontend" in last


@needs_apt
def test_what_apt_cannot_install_is_told_at_once(debian):
    process = install(debian[1], "lossgrid-unknown")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    reason = "E: Unable to locate package lossgrid-unknown"
    assert said == f"error: apt-get cannot install lossgrid-unknown: {reason}\n"


@pytest.mark.parametrize(
    ("unshare", "reason"),
    [
        ("exit 1", "root may not make namespaces here"),
        ('[ "$2" != mount ]', "root may not mount anything here"),
        ("exit 0", "no slurmctld slurmd slurmdbd munged mariadbd mariadb-install-db ip sbatch"),
    ],
)
def test_where_no_cluster_can_run_it_says_so_at_once(tmp_path, unshare, reason):
    """The commands that the script needs are there, but nothing of Slurm and no apt-get."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "realpath", "mkdir", "grep"):
        (programs / name).symlink_to(shutil.which(name))
    for name, line in {"id": "echo 0", "ldconfig": "echo libpmix.so", "unshare": unshare}.items():
        (programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (programs / name).chmod(0o755)
    environ = {"PATH": str(programs), "LOSSGRID_CLUSTER_DIR": str(tmp_path / "cluster")}
    done = subprocess.run(
        [shutil.which("bash"), CLUSTER / "cluster", "up", "1"], env=environ, text=True,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"error: {reason}")
    assert done.stderr.count("\n") == 1
