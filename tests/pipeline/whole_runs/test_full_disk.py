"""A disk that gets full, or read-only, at the very moment when one of a run's writers writes: one
line of what, where and what to do, what was there before is still readable, and once there is room
the run goes on to the same bits. `tests.pipeline.whole_runs.writers` runs on that disk."""

from __future__ import annotations

import re
from functools import cache

import pytest

from data_prep.pack import pack
from data_prep.settings import parse_dataset
from tests.pipeline.whole_runs.writers import SCENARIOS
from tests.tiny_disk import may_mount, on_tiny_disk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not may_mount(), reason="may not mount a disk of its own"),
]

REASON = {"full": "No space left on device", "read-only": "Read-only file system"}
REMEDY = "; free space or fix permissions, run again"
MEGABYTES = 224
# What is refused in turn, in the run directory.
REFUSED = {
    "submission": [
        r"grid\.toml",  # where the disk is full before that, the check for room refuses
        r"tasks/streets-seed0-\w+\.json",
        r"submitted/[\w-]+\.json",
        r"queue/local-000001\.json",
    ],
    "local_runner": [r"queue/local-000001\.refused"] * 2,
    "training": [
        r"generations/\w+",
        r"checkpoints/\w+/step-000000001-g1",
        r"checkpoints/\w+/step-000000003-g2",
        r"heads/\w+\.pt",
        r"counts/bundle-g4\.h5",
        r"counts/bundle-g5\.json",
    ],
    "deleting": [r"checkpoints/\w+/step-000000001-g1"],
    "heartbeat": [],
    "failure": [r"failures/\w+\.json"],
    "pretraining": [r"backbones/\w+\.pt", r"backbones/\w+\.json"],
    "reducing": [r"results\.h5"],
    "reporting": [
        r"report/\.tmp-[\w.-]+/table\.csv",
        r"report/\.tmp-[\w.-]+/table\.md",
        r"report/\.tmp-[\w.-]+/table\.tex",
        r"report/\.tmp-[\w.-]+/comparisons\.csv",
        r"report/\.tmp-[\w.-]+/table1\.csv",
        r"report/\.tmp-[\w.-]+/index\.html",
    ],
}
# Where a file is open for writing, a disk does not get read-only: it is so from the start.
OPEN_FILES = {
    "submission": ": Read-only file system; set run_dir to a folder of yours",
    "local_runner": f"/queue/tickets.lock: Read-only file system{REMEDY}",
}
RUN = """
import sys
from tests.pipeline.whole_runs.writers import main
main({mode!r}, {shards!r}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """By mode: the folder of the disk, what each scenario has printed to standard output, lines of
    which the last is that it went on to its end, and standard error."""
    return cache(lambda mode: run_all(mode, tmp_path_factory))


def run_all(mode, tmp_path_factory):
    folder, shards = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("streets")
    table = {"source": "synthetic", "shards": str(shards), "train": 11, "val": 3, "size": [40, 56]}
    pack("streets", parse_dataset("streets", table, "grid.toml"), processes=1)
    code = RUN.format(mode=mode, shards=str(shards))
    done = on_tiny_disk(code, folder, kilobytes=MEGABYTES << 10, seconds=400)
    assert done.returncode == 0, done.stderr
    sections = re.split(r"^== (\w+)\n", done.stdout, flags=re.MULTILINE)[1:]
    lines = {name: text.splitlines() for name, text in zip(*[iter(sections)] * 2, strict=True)}
    return folder, lines, done.stderr


def refusals(lines):
    return [line for line in lines if line.startswith(("cannot write", "cannot remove"))]


@pytest.mark.parametrize(
    ("mode", "scenario"),
    [(mode, scenario.__name__) for mode in SCENARIOS for scenario in SCENARIOS[mode]],
)
def test_no_room_is_one_line_and_with_room_it_goes_on(said, mode, scenario):
    folder, lines, _ = said(mode)
    assert lines[scenario][-1] == "went on to the end", "\n".join(lines[scenario])
    run = f"{folder}/{scenario}" + ("/run/run" if scenario != "reporting" else "")
    places = [f"{run}/{path}: {REASON[mode]}{REMEDY}" for path in REFUSED[scenario]]
    if mode == "read-only" and scenario in OPEN_FILES:
        places = [f"{run}{OPEN_FILES[scenario]}"]
    found = refusals(lines[scenario])
    assert len(found) == len(places), found
    for line, place in zip(found, places, strict=True):
        assert re.fullmatch(f"cannot (write (into )?|remove ){place}", line)


def test_a_heartbeat_without_room_ends_no_job(said):
    """Days of work are worth more than the news that they go on. It is said once."""
    folder, _, logs = said("full")
    (warning,) = [line for line in logs.splitlines() if "heartbeat" in line]
    assert warning == (
        f"bundle (generation 1): warning: cannot write {folder}/heartbeat/run/run/progress/"
        f"bundle.json: {REASON['full']}{REMEDY}; without a heartbeat training goes on"
    )
