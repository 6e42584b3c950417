"""A full or read-only disk is reported in one line, and packed shards stay good."""

from __future__ import annotations

import os
import re

import pytest

from data_prep.pack import pack
from tests.tiny_disk import NO_ROOM, may_mount, on_tiny_disk

# files that fill a disk together need a real one; the limit that stands in for it is each file's
NEEDS_DISK = pytest.mark.skipif(not may_mount(), reason="may not mount a disk of its own")

PACKS = """
import sys
from pathlib import Path
from data_prep.pack import main
from hpc.cli import run
{before}
run(main, [{config!r}, "--processes", "1"])
"""
FULL = rf"error: cannot write .*/disk/.*: {NO_ROOM}; free space or fix permissions, run again"
ROOM_AT_FIRST = """
import shutil
from collections import namedtuple
shutil.disk_usage = lambda _: namedtuple("usage", "free")(10**12)
"""
READ_ONLY = """
import os, subprocess
from tests.tiny_disk import Disk
try:
    Disk(sys.argv[1], "read-only").close()
except subprocess.CalledProcessError:  # a folder, where no disk may be mounted
    os.chmod(sys.argv[1], 0o555)
"""


@pytest.fixture
def packing(rooms, tmp_path):
    """Pack on a separate disk of the given number of kilobytes."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(kilobytes: int, before: str = ""):
        rooms.table["shards"] = str(disk)
        code = PACKS.format(config=str(rooms.config()), before=before)
        return on_tiny_disk(code, disk, kilobytes)

    return run


# 1,000 kB is what HDF5's own structures are allowed at most, and tried for before they are written
@pytest.mark.parametrize(
    "kilobytes", [4, 40, 500, *(pytest.param(size, marks=NEEDS_DISK) for size in (980, 1000, 1010))]
)
def test_a_full_disk_is_one_line(rooms, packing, kilobytes):
    rooms.pair("large", (100, 110))
    done = packing(kilobytes)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "shards:" not in line]
    too_large = r"error: no room for the shards in .*/disk: .* GB needed, .* GB free; make room, or"
    assert len(lines) == 1 and re.match(f"{FULL}|{too_large}", lines[0]), done.stderr


@NEEDS_DISK
def test_a_disk_that_others_fill_meanwhile_is_one_line(rooms, packing):
    rooms.pair("large", (700, 700))  # 2 MB in the arenas
    done = packing(1500, ROOM_AT_FIRST)
    assert done.returncode == 2
    assert re.fullmatch(rf"{FULL}\n", done.stderr)


def test_a_disk_with_room_is_enough(rooms, packing):
    assert packing(1300).returncode == 0


def test_a_read_only_folder_is_one_line(packing):
    done = packing(2000, READ_ONLY)
    if os.geteuid() == 0 and done.returncode == 0:
        pytest.skip("this user may neither mount a disk nor be kept from writing")
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: cannot write into .*/disk: no permission; set shards to another folder\n",
        done.stderr,
    )


def test_packed_data_need_no_writable_folder(rooms, packing, tmp_path):
    rooms.table["shards"] = str(tmp_path / "disk")
    before = "import shutil; shutil.copytree({!r}, sys.argv[1], dirs_exist_ok=True)\n"
    made = pack("rooms", rooms.settings, processes=1).folder.rename(tmp_path / "made")
    (made / ".tmp-dead").touch()
    os.utime(made / ".tmp-dead", (0, 0))
    (tmp_path / "disk").mkdir()
    done = packing(2000, before.format(str(made)) + READ_ONLY)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rooms train: 3 images, 1 shards" in done.stdout
