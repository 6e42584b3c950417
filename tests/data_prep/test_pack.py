"""Packing gives the same shards on any ranks, is quick without changes, and may be interrupted."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from data_prep.pack import pack
from data_prep.shards.manifest import Manifest
from data_prep.shards.reader import SplitReader
from data_prep.verify import verify
from hpc.cli import UserError
from tests.tiny_disk import may_mount


def _shards(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.h5")}


def _times(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.h5")}


def test_processes_and_ranks_give_the_same_bytes(many_rooms, command, mpiexec):
    pack("rooms", many_rooms.settings, processes=1)
    alone = _shards(many_rooms.shards), Manifest.load(many_rooms.shards).fingerprint
    assert len(alone[0]) == 12
    for launcher, options in (((), ("--processes", 4)), ((mpiexec, "-n", "3"), ())):
        shutil.rmtree(many_rooms.shards)
        done = command("data_prep.pack", many_rooms.config(), *options, launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("rooms train: 11 images, 11 shards") == 1  # one rank reports
        found = _shards(many_rooms.shards), Manifest.load(many_rooms.shards).fingerprint
        assert found == alone, (launcher, options)


def test_a_bad_file_stops_all_ranks_with_one_line(many_rooms, command, mpiexec):
    path = many_rooms.root / "train" / "room3.png"
    path.write_bytes(path.read_bytes()[:5000])
    done = command("data_prep.pack", many_rooms.config(), launcher=(mpiexec, "-n", "2"))
    assert done.returncode == 2
    assert "room3.png cannot be read as an image" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (many_rooms.shards / "manifest.json").exists()


@pytest.mark.skipif(not may_mount(), reason="this user may not mount")
def test_an_unusable_dev_shm_is_one_line(many_rooms, command):
    sick = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"', "sh")
    done = command("data_prep.pack", many_rooms.config(), "--processes", 2, launcher=sick)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *_, error = done.stderr.splitlines()
    assert error.startswith("error: cannot start 2 packing processes: Read-only file system; make")


def test_a_second_run_writes_nothing(rooms):
    first = pack("rooms", rooms.settings)
    files = {p.name: p.stat().st_mtime_ns for p in rooms.shards.iterdir()}
    assert pack("rooms", rooms.settings) == first
    assert {p.name: p.stat().st_mtime_ns for p in rooms.shards.iterdir()} == files


def test_only_the_shards_of_changed_files_are_written_again(many_rooms):
    pack("rooms", many_rooms.settings, processes=1)
    before = _times(many_rooms.shards)
    many_rooms.label("room4.png", (520, 500), values=(1,))
    pack("rooms", many_rooms.settings, processes=1)
    after = _times(many_rooms.shards)
    assert len(after.keys() - before.keys()) == 1
    assert before.items() <= after.items()


def test_a_missing_shard_is_packed_again(rooms):
    first = pack("rooms", rooms.settings)
    rooms.shard("val-00000").unlink()
    assert pack("rooms", rooms.settings) == first
    assert rooms.shard("val-00000").exists()


def test_an_interrupted_change_leaves_the_data_set_as_it_was(rooms, monkeypatch):
    before = pack("rooms", rooms.settings)
    rooms.label("a.png", (20, 31), values=(0,))
    monkeypatch.setattr(
        "data_prep.packing.pack_shard.file_sha256", lambda path: os.kill(os.getpid(), 2)
    )
    with pytest.raises(KeyboardInterrupt):
        pack("rooms", rooms.settings)
    assert Manifest.load(rooms.shards) == before
    assert verify(before, processes=1) == []
    assert not list(rooms.shards.glob(".tmp-*"))


def test_a_job_that_opens_a_shard_after_a_change_reads_the_earlier_one(rooms):
    """A job reads the manifest first, and opens shards when it first needs them."""
    earlier = SplitReader(pack("rooms", rooms.settings), "train")
    rooms.label("b.png", (70, 30), values=(1,))
    later = SplitReader(pack("rooms", rooms.settings), "train")
    assert set(later.label(1).flat) == {1} != set(earlier.label(1).flat)


def test_unneeded_shards_are_removed_and_other_files_stay(rooms):
    """Shards of earlier content are needed as long as jobs that began on it may run."""
    mine = ["notes.txt", ".tmp-host-alive"]
    removed = [".tmp-host-dead", "train-00007.json", "train-00007-0123456789ab.h5"]
    rooms.shards.mkdir()
    for name in mine + removed:
        (rooms.shards / name).touch()
    os.utime(rooms.shards / ".tmp-host-dead", (0, 0))
    first = pack("rooms", rooms.settings)
    rooms.label("a.png", (20, 31), values=(1,))
    second = pack("rooms", rooms.settings)
    records = {"manifest.json", "train-00000.json", "val-00000.json", *mine}
    assert len(first.files | second.files) == 3
    assert {p.name for p in rooms.shards.iterdir()} == records | first.files | second.files

    os.utime(rooms.shards / "manifest.json", (time.time() - 31 * 86400,) * 2)
    assert pack("rooms", rooms.settings) == second
    assert {p.name for p in rooms.shards.iterdir()} == records | second.files


def test_disk_space_is_checked_before_anything_is_written(rooms, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(UserError, match=r"no room for the shards in .*/shards: .* GB needed"):
        pack("rooms", rooms.settings)
    assert not list(rooms.shards.iterdir())


def test_one_data_set_of_several_can_be_packed(rooms, command_line):
    config = rooms.config()
    config.write_text(
        config.read_text() + '\n[dataset.absent]\nsource = "folder"\nroot = "absent"\n'
        'classes = ["a", "b"]\n'
    )
    words = ("data_prep.pack", config, "--processes", 1)
    assert command_line(*words, "--dataset", "rooms")[0] == 0
    code, _, errors = command_line(*words, "--dataset", "room")
    assert code == 2 and "did you mean 'rooms'" in errors
    code, _, errors = command_line(*words)
    assert code == 2 and "absent/train: No such file or directory" in errors


def test_ctrl_c_ends_with_130(many_rooms):
    line = [sys.executable, "-m", "data_prep.pack", many_rooms.config(), "--processes", "2"]
    packing = subprocess.Popen(line, stderr=subprocess.PIPE, start_new_session=True, text=True)
    _wait(lambda: list(many_rooms.shards.glob("train-*.json")))
    os.killpg(packing.pid, signal.SIGINT)  # as a terminal does: every process gets it
    _, errors = packing.communicate(timeout=30)
    assert packing.returncode == 130
    assert "interrupted" in errors


def _wait(happened, seconds=30.0):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
