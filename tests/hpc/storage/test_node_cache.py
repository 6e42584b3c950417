"""A node has one copy on its own disk: checked, shared, and removed when it is unused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpc.storage import node_cache
from hpc.storage.atomic import Damaged
from hpc.storage.node_cache import SharedFile, cached_copy
from tests.tiny_disk import REPOSITORY, may_mount, on_tiny_disk

CONTENT = {"a.h5": b"one" * 1000, "b.h5": b"two" * 5_000_000}
# A process that prints where it reads, and stays until its standard input ends.
USER = """
import sys, hashlib
from pathlib import Path
from hpc.storage.node_cache import SharedFile, cached_copy
source, place = map(Path, sys.argv[1:3])
files = [SharedFile(f.name, f.stat().st_size, hashlib.sha256(f.read_bytes()).hexdigest())
         for f in sorted(source.glob("*.h5"))]
with cached_copy(source, files, "key", str(place)) as folder:
    found = {f.name: f.stat().st_ino for f in folder.glob("*.h5")}
    print(folder, found, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def disk(tmp_path) -> Path:
    folder = tmp_path / "node"
    folder.mkdir()
    return folder


def files() -> list[SharedFile]:
    return [
        SharedFile(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in CONTENT.items()
    ]


def left_on(disk: Path) -> list[str]:
    return sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file())


@contextmanager
def user(source: Path, disk: Path):
    """Yield a process that holds the copy, and its output."""
    line = [sys.executable, "-c", USER, str(source), str(disk)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, cwd=REPOSITORY, **pipes)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stdin.close()
        process.stdout.close()


def finish(process: subprocess.Popen) -> None:
    process.stdin.close()
    assert process.wait(timeout=30) == 0


def test_the_copy_is_whole_and_private_and_gone_afterwards(source, disk):
    with cached_copy(source, files(), "key", str(disk)) as folder:
        assert folder != source
        assert {f.name: f.read_bytes() for f in folder.glob("*.h5")} == CONTENT
        assert folder.parent.stat().st_mode & 0o077 == 0
    assert left_on(disk) == []
    assert sorted(f.name for f in source.iterdir()) == ["a.h5", "b.h5"]


def test_processes_of_a_node_share_one_copy_until_the_last_ends(source, disk):
    with user(source, disk) as (first, said), user(source, disk) as (second, said_too):
        assert said == said_too  # the same files, by their inodes
        assert str(disk) in said
        finish(first)
        assert len(left_on(disk)) == 4  # two files, a mark that they are whole, a lock
        with user(source, disk) as (third, then):
            assert then == said
            finish(second)
            assert len(left_on(disk)) == 4
            finish(third)
    assert left_on(disk) == []


def test_many_at_once_make_one_copy(source, disk):
    line = [sys.executable, "-c", USER, str(source), str(disk)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    users = [subprocess.Popen(line, cwd=REPOSITORY, **pipes) for _ in range(4)]
    assert len({process.stdout.readline() for process in users}) == 1
    for process in users:
        finish(process)
        process.stdout.close()
    assert left_on(disk) == []


def test_the_next_process_removes_a_killed_ones_copy(source, disk):
    with user(source, disk) as (process, _):
        process.kill()
        process.wait()
    assert len(left_on(disk)) == 4
    with cached_copy(source, files()[:1], "another", str(disk)):
        assert not [path for path in left_on(disk) if "/key" in path]
    assert left_on(disk) == []


def test_an_incomplete_copy_is_made_again(source, disk, monkeypatch):
    """A copy whose process was killed while copying is not used."""
    with user(source, disk) as (process, _):
        process.kill()
        process.wait()
    own = next(disk.iterdir())
    (own / "key" / "complete").unlink()
    (own / "key" / "b.h5").write_bytes(b"two")
    monkeypatch.setattr(node_cache, "_sweep", lambda own: None)  # the others were at it as well
    with cached_copy(source, files(), "key", str(disk)) as folder:
        assert (folder / "b.h5").read_bytes() == CONTENT["b.h5"]


def test_a_damaged_file_is_named_and_nothing_stays(source, disk):
    with (source / "b.h5").open("r+b") as file:
        file.write(b"T")
    with pytest.raises(Damaged, match=r"shared/b\.h5 is damaged"):
        cached_copy(source, files(), "key", str(disk)).__enter__()
    assert [path for path in left_on(disk) if path.endswith(".h5")] == []


@pytest.mark.parametrize("place", ["$NO_SUCH_VARIABLE/x", "$EMPTY", "/proc/nothing"])
def test_without_a_folder_on_the_node_the_shared_one_is_read(source, place, monkeypatch, capsys):
    monkeypatch.setenv("EMPTY", "")
    with cached_copy(source, files(), "key", place) as folder:
        assert folder == source
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert said.endswith(f"reading from {source}\n")
    assert said.count("\n") == 1


FULL = """
import sys
from pathlib import Path
from hpc.storage import node_cache
from hpc.storage.node_cache import SharedFile, cached_copy
if sys.argv[2:] == ["unforeseen"]:  # others fill the disk while we copy
    node_cache._SPARE_BYTES = -10**9
place = Path(sys.argv[1])
source = place.parent / "shared"
with cached_copy(source, [SharedFile("b.h5", 15_000_000, "?")], "key", str(place)) as folder:
    print(folder == source)
print([str(path.name) for path in place.rglob("*") if path.suffix == ".h5"])
"""


@pytest.mark.skipif(not may_mount(), reason="this user may not mount a small disk")
@pytest.mark.parametrize("when", ["seen", "unforeseen"])
def test_a_disk_with_too_little_space_is_not_used(source, disk, when):
    code = FULL.replace('sys.argv[2:] == ["unforeseen"]', repr(when == "unforeseen"))
    done = on_tiny_disk(code, disk, kilobytes=2048)
    assert done.stdout == "True\n[]\n"
    assert done.stderr.count("\n") == 1
    assert "warning: " in done.stderr


def test_a_copy_that_others_remove_meanwhile_is_made_again(source, disk):
    """The last user may remove copy and lock file before this process has the lock."""
    for _ in range(3):
        with user(source, disk) as (process, _said):
            process.stdin.close()
            with cached_copy(source, files(), "key", str(disk)) as folder:
                time.sleep(0.05)
                assert {f.name: f.read_bytes() for f in folder.glob("*.h5")} == CONTENT
            process.wait(timeout=30)
    assert left_on(disk) == []


def test_each_user_has_a_folder_on_the_node(source, disk):
    with cached_copy(source, files(), "key", str(disk)) as folder:
        assert folder.parent.name == f"lossgrid-{os.geteuid()}"
