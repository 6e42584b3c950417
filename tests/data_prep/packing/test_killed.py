"""The next run finishes packing that was killed at any point, on one or several MPI ranks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.pack import pack
from data_prep.shards.manifest import Manifest
from data_prep.verify import verify
from tests.data_prep.conftest import REPOSITORY

RANKS = 4


@pytest.fixture
def packing(many_rooms, request):
    """Start the packing program on one or several ranks, and observe it."""
    line = [sys.executable, "-m", "data_prep.pack", str(many_rooms.config())]
    if request.param == "ranks":
        line = [request.getfixturevalue("mpiexec"), "-n", str(RANKS), *line]
    started: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        quiet = subprocess.DEVNULL
        started.append(subprocess.Popen(line, cwd=REPOSITORY, stdout=quiet, stderr=quiet))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


on_ranks = pytest.mark.parametrize("packing", ["alone", "ranks"], indirect=True)


@on_ranks
def test_killed_while_it_writes_a_shard(many_rooms, packing):
    launcher = packing()
    while not recorded(many_rooms.shards):
        assert launcher.poll() is None, "it ended without a record"
        time.sleep(0.002)
    kill(caught_writing(many_rooms.shards, launcher), launcher)
    assert any(unfinished(path) for path in many_rooms.shards.iterdir())
    finished_by_the_next_run(many_rooms)


@on_ranks
def test_killed_at_random_moments(many_rooms, packing):
    moments = random.Random(5)
    for _ in range(4):
        launcher = packing()
        time.sleep(moments.uniform(0.3, 1.0))
        kill(launcher.pid, launcher)
    finished_by_the_next_run(many_rooms)


def finished_by_the_next_run(rooms) -> None:
    left, times = hashes(rooms.shards), recorded(rooms.shards)
    manifest = pack("rooms", rooms.settings, processes=1)
    assert verify(manifest, processes=1) == []
    assert times.items() <= recorded(rooms.shards).items()  # these were not written again
    resumed = hashes(rooms.shards)
    shutil.rmtree(rooms.shards)
    undisturbed = pack("rooms", rooms.settings, processes=1)
    assert Manifest.load(rooms.shards) == manifest == undisturbed
    assert len(resumed) == 12 and resumed == hashes(rooms.shards)
    assert left.items() <= resumed.items()  # a shard under its name was whole from the first


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.h5")}


def recorded(folder: Path) -> dict[str, int]:
    """Return the times of the shards that have a record."""
    records = [json.loads(path.read_text()) for path in folder.glob("*-*.json")]
    files = [record["summary"]["file"] for record in records]
    return {file: (folder / file).stat().st_mtime_ns for file in files}


def caught_writing(shards: Path, launcher: subprocess.Popen) -> int:
    """Return a process that is stopped in the middle of a shard."""
    end = time.monotonic() + 30
    while time.monotonic() < end and launcher.poll() is None:
        for process in family(launcher.pid):
            if not writes_into(process, shards):
                continue
            os.kill(process, signal.SIGSTOP)
            if writes_into(process, shards):
                return process
            os.kill(process, signal.SIGCONT)
    raise AssertionError("no process was seen writing")


def writes_into(process: int, shards: Path) -> bool:
    try:
        files = [str(entry.readlink()) for entry in Path(f"/proc/{process}/fd").iterdir()]
    except OSError:
        return False
    return any(unfinished(Path(file)) for file in files if file.startswith(f"{shards}/"))


def unfinished(file: Path) -> bool:
    """Return whether the file is a shard without its CRCs, which are written last."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return len(content) > 500_000 and not any(content[-4:])


def family(leader: int) -> list[int]:
    """Return `leader` and its living descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if state != "Z":
            parents[int(path.parent.name)] = int(parent)
    found = [leader]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return [process for process in found if process in parents]


def kill(victim: int, launcher: subprocess.Popen) -> None:
    """Kill one process, and wait until all ranks have ended."""
    members = family(launcher.pid)
    os.kill(victim, signal.SIGKILL)
    launcher.wait(timeout=30)
    end = time.monotonic() + 30
    while any(Path(f"/proc/{member}").exists() for member in members):
        assert time.monotonic() < end, "a packing process outlives its launcher"
        time.sleep(0.01)
