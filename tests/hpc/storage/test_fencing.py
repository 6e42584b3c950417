"""A later start takes over, and a start that was cut off can do no harm."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from hpc.cli import UserError
from hpc.storage import checkpoint
from hpc.storage.atomic import Damaged
from hpc.storage.fencing import Superseded, claim
from tests.tiny_disk import NO_ROOM, on_tiny_disk

REPOSITORY = Path(__file__).parents[3]
CLAIMER = """
import sys
from pathlib import Path
from hpc.storage.fencing import claim
input()
for _ in range(20):
    print(claim(Path(sys.argv[1]), [sys.argv[2]]).number)
"""


def test_generations_count_from_one(tmp_path):
    folder = tmp_path / "generations/bundle"
    assert [claim(folder, ["a"]).number for _ in range(3)] == [1, 2, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_generations_are_ordered_as_numbers(tmp_path):
    for _ in range(11):
        last = claim(tmp_path, ["a"])
    assert last.number == 11  # after 10, which as text comes before 2
    assert not last.is_superseded()


def test_eight_simultaneous_starts_get_different_numbers(tmp_path):
    folder = tmp_path / "generations"
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, str(folder), str(number)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for claimer in claimers:
        assert claimer.stdin
        claimer.stdin.write("go\n")
        claimer.stdin.flush()
    numbers = [[int(word) for word in claimer.communicate()[0].split()] for claimer in claimers]
    assert sorted(chain.from_iterable(numbers)) == list(range(1, 161))
    assert all(mine == sorted(mine) for mine in numbers)
    assert sorted(int(path.name) for path in folder.iterdir()) == list(range(1, 161))


def test_a_later_start_for_one_of_the_same_entries_takes_over(tmp_path):
    first = claim(tmp_path, ["a", "b"])
    first.check()
    second = claim(tmp_path, ["b", "c"])
    second.check()
    with pytest.raises(Superseded, match=r"generation 1 in .* has a successor"):
        first.check()
    assert not second.is_superseded()


def test_a_later_start_for_other_entries_changes_nothing(tmp_path):
    first = claim(tmp_path, ["a", "b"])
    claim(tmp_path, ["c"])
    claim(tmp_path, [])
    assert not first.is_superseded()


def test_other_files_are_not_taken_for_claims(tmp_path):
    first = claim(tmp_path, ["a"])
    (tmp_path / ".nfs0001").write_text("x")
    (tmp_path / ".tmp-killed").write_text("")
    assert not first.is_superseded()
    assert claim(tmp_path, ["a"]).number == 2


def test_a_claim_that_cannot_be_read_is_named_and_nothing_is_written_against_it(tmp_path):
    first = claim(tmp_path, ["a"])
    claim(tmp_path, ["b"])
    (tmp_path / "2").write_text('["b')
    with pytest.raises(Damaged, match=f"the claim {tmp_path}/2 is damaged; delete it"):
        first.check()


def test_a_start_whose_claims_were_deleted_is_superseded(tmp_path):
    first = claim(tmp_path / "claims", ["a"])
    shutil.rmtree(tmp_path / "claims")
    with pytest.raises(Superseded):
        first.check()


FULL = """
import sys
from pathlib import Path
from hpc.cli import UserError
from hpc.storage.fencing import claim
disk = Path(sys.argv[1])
(disk / "generations").mkdir()
try:
    claim(disk / "generations", ["x" * 300_000])
except UserError as error:
    print(error)
print(list((disk / "generations").iterdir()))
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    done = on_tiny_disk(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    line, left = done.stdout.splitlines()
    start = re.escape(f"cannot write into {tmp_path / 'generations'}: ")
    assert re.fullmatch(f"{start}{NO_ROOM}; free space or fix permissions, run again", line)
    assert left == "[]"


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    generation = claim(tmp_path, ["a"])

    def lose(_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "iterdir", lose)
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Stale file handle; check"):
        generation.check()
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Stale file handle; check"):
        checkpoint.find(tmp_path)


def test_an_impossible_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write into .*/file/generations: Not a directory"):
        claim(tmp_path / "file/generations", ["a"])
