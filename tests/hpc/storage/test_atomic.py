"""Files and folders appear whole, or stay as they were."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.cli import UserError
from hpc.storage import atomic
from hpc.storage.atomic import (
    TEMPORARY_PREFIX,
    Damaged,
    file_sha256,
    fingerprint,
    new_file,
    new_files,
    new_folder,
    read_json,
    remove_dead_folders,
    remove_file,
    remove_folder,
    rename_file,
    write_bytes,
    write_json,
    write_text,
)
from tests.tiny_disk import NO_ROOM, on_tiny_disk

REPOSITORY = Path(__file__).parents[3]


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", f"import sys; from hpc.storage.atomic import *\n{code}"]
    return subprocess.Popen(
        [*line, *map(str, arguments)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_files_exist_and_no_others(tmp_path):
    write_bytes(tmp_path / "a/b/c.bin", b"\x00\xff")
    write_text(tmp_path / "a/b/d.txt", "µ\n")
    write_json(tmp_path / "a/b/e.json", {"rate": 0.1, "names": ["ä"]})
    assert names(tmp_path / "a/b") == ["c.bin", "d.txt", "e.json"]
    assert (tmp_path / "a/b/c.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "a/b/d.txt").read_bytes() == "µ\n".encode()
    assert read_json(tmp_path / "a/b/e.json") == {"rate": 0.1, "names": ["ä"]}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.txt", []

    def fsync(descriptor):
        seen.append((Path(f"/proc/self/fd/{descriptor}").resolve().name, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "x")
    (content, folder) = seen
    assert content[0].startswith(TEMPORARY_PREFIX) and not content[1]
    assert folder == (tmp_path.name, True)


def test_each_of_several_files_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        atomic, "fsync", lambda path: seen.append((path.name, (tmp_path / path.name).exists()))
    )
    with new_files(tmp_path, "b.txt") as folder:
        for name in ("b.txt", "a.txt"):
            (folder / name).write_text("x")
    assert seen[:2] == [("a.txt", False), ("b.txt", False)]


@pytest.mark.parametrize(("change", "verb"), [
    (remove_file, "remove"), (remove_folder, "remove"),
    (lambda path: rename_file(path, "x"), "rename"),
])  # fmt: skip
def test_an_error_says_what_was_tried(tmp_path, monkeypatch, change, verb):
    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name in ("unlink", "rename"):
        monkeypatch.setattr(Path, name, fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"cannot {verb} {tmp_path}/a: "):
        change(tmp_path / "a")


KILLED = """
with new_file(sys.argv[1]) as path, path.open("w") as file:
    file.write("half of the n"); file.flush()
    print("writing", flush=True)
    import time; time.sleep(60)
"""


def kill_while_it_writes(code: str, path: Path) -> None:
    writer = python(code, path)
    assert writer.stdout
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait(timeout=10) == -signal.SIGKILL
    writer.stdout.close()


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    write_text(path, "the old content")
    kill_while_it_writes(KILLED, path)
    assert path.read_text() == "the old content"
    write_text(path, "the new content")  # and is in nobody's way
    assert path.read_text() == "the new content"


def test_a_writer_killed_before_its_first_file_leaves_none(tmp_path):
    kill_while_it_writes(KILLED, tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()


def test_a_folders_writer_killed_in_the_middle_leaves_no_folder(tmp_path):
    code = KILLED.replace("new_file(sys.argv[1])", "new_folder(sys.argv[1])")
    kill_while_it_writes(code.replace("path.open(", "(path / 'part').open("), tmp_path / "result")
    assert not (tmp_path / "result").exists()
    with new_folder(tmp_path / "result") as folder:
        (folder / "part").write_text("whole")
    assert names(tmp_path / "result") == ["part"]


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_an_error_while_writing_leaves_nothing(tmp_path, new):
    with pytest.raises(ZeroDivisionError), new(tmp_path / "a") as path:
        (path / "x" if path.is_dir() else path).write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == []


FULL = """
import sys
from pathlib import Path
from hpc.storage.atomic import *
from hpc.cli import UserError
def folder(path):
    with new_folder(path) as temporary:
        (temporary / "a").write_bytes(bytes(10))
        (temporary / "b").write_bytes(bytes(400_000))
disk = Path(sys.argv[1])
write_text(disk / "old.txt", "old")
attempts = {
    "new.bin": lambda path: write_bytes(path, bytes(400_000)),
    "old.txt": lambda path: write_text(path, "x" * 400_000),
    "new.json": lambda path: write_json(path, {"a": "x" * 400_000}),
    "folder": folder,
}
for name, attempt in attempts.items():
    try:
        attempt(disk / name)
    except UserError as error:
        print(error)
print(*sorted(path.name for path in disk.iterdir()), (disk / "old.txt").read_text())
"""


def test_a_full_disk_leaves_nothing_and_gives_one_line(tmp_path):
    done = on_tiny_disk(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    *refusals, left = done.stdout.splitlines()
    for name, line in zip(["new.bin", "old.txt", "new.json", "folder"], refusals, strict=True):
        start = re.escape(f"cannot write {tmp_path / name}: ")
        assert re.fullmatch(f"{start}{NO_ROOM}; free space or fix permissions, run again", line)
    assert left == "old.txt old"


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_an_impossible_path_is_one_line(tmp_path, new):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"cannot write .*/file/x: (Not a dir|File ex)"),
        new(tmp_path / "file/x"),
    ):
        pass
    assert names(tmp_path) == ["file"]


def test_a_folder_that_exists_is_refused_and_stays(tmp_path):
    for content in ([], ["kept"]):  # a rename would replace an empty one in silence
        old = tmp_path / f"old{len(content)}"
        old.mkdir()
        for name in content:
            (old / name).touch()
        with pytest.raises(FileExistsError), new_folder(old) as folder:
            (folder / "new").touch()
        assert names(old) == content
    assert names(tmp_path) == ["old0", "old1"]


def test_of_two_writers_of_one_folder_the_first_wins(tmp_path):
    with pytest.raises(FileExistsError), new_folder(tmp_path / "a") as second:
        (second / "second").touch()
        with new_folder(tmp_path / "a") as first:
            (first / "first").touch()
    assert names(tmp_path / "a") == ["first"]


def test_of_two_writers_at_the_same_moment_one_wins(tmp_path, monkeypatch):
    path = tmp_path / "a"
    with new_folder(path) as first:
        (first / "first").touch()
    # the second looked when the first was not there yet
    monkeypatch.setattr(Path, "exists", lambda self, **_: False)
    with pytest.raises(FileExistsError), new_folder(path) as second:
        (second / "second").touch()
    assert names(path) == ["first"]


WRITERS = """
for number in range(25):
    write_json(sys.argv[1], {"writer": sys.argv[2], "content": [number] * 20_000})
"""


def test_many_writers_and_a_reader_who_always_sees_one_whole_file(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"writer": "", "content": []})
    writers = [python(WRITERS, path, writer) for writer in "abc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        record = read_json(path)  # raises if it is not as one of them wrote it
        seen.add(record["writer"])
    for writer in writers:
        assert writer.wait() == 0
        assert writer.stdout
        writer.stdout.close()
    assert len(seen & set("abc")) > 1
    assert names(tmp_path) == ["state.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("12", "13"),
        lambda text: text.replace("checksum", "chocksum"),
        lambda text: "[1, 2]",
        lambda text: "[" * 100_000,
        lambda text: text.replace("step", "\udcff"),
    ],
    ids=["empty", "cut", "changed", "no checksum", "list", "deep", "not UTF-8"],
)
def test_a_damaged_record_is_named(tmp_path, damage):
    path = tmp_path / "index.json"
    write_json(path, {"step": 12})
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    with pytest.raises(Damaged) as refused:
        read_json(path)
    assert str(refused.value) == (
        f"{path} is damaged (its checksum differs); delete it and run again"
    )


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda record: json.dumps(record),
        lambda record: json.dumps(dict(reversed(record.items())), indent=4),
        lambda record: json.dumps({**record, "above": "f" * 64}, indent=1),
    ],
    ids=["one line", "another order", "its last line damaged"],
)
def test_a_record_may_be_reformatted_but_not_changed(tmp_path, lay_out):
    path, record = tmp_path / "index.json", {"step": 12, "name": "Zürich", "loss": [1.5, None]}
    write_json(path, record)
    path.write_text(lay_out(json.loads(path.read_text())))
    assert read_json(path) == record
    path.write_text(path.read_text().replace("12", "13"))
    with pytest.raises(Damaged):
        read_json(path)


def test_a_missing_record_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_equal_values_have_equal_fingerprints(tmp_path):
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    assert fingerprint(["1"]) != fingerprint([1])
    assert fingerprint({"a": 1}) == (  # `printf '{"a":1}' | sha256sum`
        "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    )
    (tmp_path / "a").write_bytes(b'{"a":1}')
    assert file_sha256(tmp_path / "a") == fingerprint({"a": 1})


def test_a_folder_is_deleted_in_one_step(tmp_path, monkeypatch):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "index").touch()
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before it gets there
    remove_folder(folder)
    assert not folder.exists()
    remove_folder(folder)  # somebody else did it: nothing to do


def test_folders_of_killed_writers_are_removed_after_an_hour(tmp_path):
    for name in (f"{TEMPORARY_PREFIX}dead", f"{TEMPORARY_PREFIX}alive", "result"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    (tmp_path / f"{TEMPORARY_PREFIX}a-file").touch()
    old = time.time() - 7200
    for path in (*tmp_path.glob("*/part"), *tmp_path.iterdir()):
        os.utime(path, (old, old))
    os.utime(tmp_path / f"{TEMPORARY_PREFIX}alive" / "part")
    remove_dead_folders(tmp_path)
    assert names(tmp_path) == [f"{TEMPORARY_PREFIX}a-file", f"{TEMPORARY_PREFIX}alive", "result"]
    remove_dead_folders(tmp_path / "none")
