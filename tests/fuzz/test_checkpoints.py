"""After any damage to a folder of checkpoints, a job goes on from a state that was saved for it, at
the step it says, or starts over; what it passed over is named, and nobody deletes what is whole."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from hpc.cli import one_line
from hpc.storage import checkpoint
from hpc.storage.atomic import read_json, write_json
from hpc.storage.checksum import file_crc32
from hpc.storage.fencing import Generation, claim
from tests.fuzz.accidents import damaged
from tests.fuzz.cases import fuzzed

SIZES = {"a": 3, "b": 4, "c": 5}  # of each entry's weights
INDEX, NAME = "index.json", re.compile(r"step-\d{9}-g\d+")
SAVED = ((20, 1, "ab"), (20, 2, "c"), (30, 1, "ab"), (30, 2, "c"))  # step, generation, entries


def state_of(entry: str, step: int) -> dict[str, object]:
    numbers = torch.Generator().manual_seed(step + ord(entry))
    weight = torch.randn(SIZES[entry], 7, generator=numbers)
    return {"network": {"weight": weight}, "momentum": {0: weight * 2}, "scale": step / 3}


def equal(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def fits(entry: str, state: object) -> bool:
    """Hold the names and shapes of a job's states."""
    try:
        return state["network"]["weight"].shape == (SIZES[entry], 7)  # type: ignore[index]
    except (KeyError, TypeError, AttributeError):
        return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two bundles, each with two steps of two jobs, and the claims of these jobs."""
    root = tmp_path_factory.mktemp("whole")
    for bundle in ("ours", "theirs"):
        jobs = [claim(root / "generations" / bundle, entries) for entries in ("ab", "c")]
        for step, number, entries in SAVED:
            shift = 0 if bundle == "ours" else 1000
            states = {entry: state_of(entry, step + shift) for entry in entries}
            checkpoint.save(root / bundle, step, jobs[number - 1], states, {"inputs": {"x": "1"}})
    assert len(list((root / "ours").iterdir())) == len(SAVED)
    return root


class Opens:
    """Pickles to a call that leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Accidents:
    """Damages to the folder `ours` of a copy of the two bundles."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.root, self.folder, self.chance = root, root / "ours", chance
        self.forged: set[str] = set()  # whose index is not as written, and yet fits its checksum

    def happen(self) -> None:
        kinds = (self.damage, self.damage, self.damage, self.swap, self.rename, self.delete,
                 self.forge, self.stray, self.replace_by_folder)  # fmt: skip
        for _ in range(self.chance.choice((1, 1, 2, 3, 5))):
            self.chance.choice(kinds)()

    def file(self) -> Path | None:
        files = sorted(p for p in self.folder.glob("step-*/*") if p.is_file())
        return self.chance.choice(files) if files else None

    def checkpoint(self) -> Path | None:
        folders = sorted(p for p in self.folder.glob("step-*") if p.is_dir())
        return self.chance.choice(folders) if folders else None

    def damage(self) -> None:
        if path := self.file():
            path.write_bytes(damaged(self.chance, path.read_bytes()))

    def swap(self) -> None:
        """A file takes the place of another, of this bundle or the other one's."""
        others = sorted(p for p in self.root.glob("*/step-*/*") if p.is_file())
        if path := self.file():
            other = self.chance.choice(others)
            mine, new = path.read_bytes(), other.read_bytes()
            path.write_bytes(new)
            if self.folder in other.parents:
                other.write_bytes(mine)

    def rename(self) -> None:
        """A folder is renamed or copied; or one of the other bundle is."""
        folders = sorted(self.root.glob("*/step-*"))
        if folders:
            names = ("step-000000030-g3", "step-000000099-g1", "step-000000020-g9", "step-5", "x")
            place = self.folder / self.chance.choice(names)
            source = self.chance.choice(folders)
            if not os.path.lexists(place) and source.is_dir():
                if source.parent == self.folder and self.chance.random() < 0.5:
                    source.rename(place)
                else:
                    shutil.copytree(source, place, symlinks=True)

    def delete(self) -> None:
        path = self.file() if self.chance.random() < 0.7 else self.checkpoint()
        if path and path.is_dir():
            shutil.rmtree(path)
        elif path:
            path.unlink()

    def forge(self) -> None:
        """An entry is replaced, and its checksum in the index as well."""
        path = self.file()
        if path is None or path.suffix != ".pt" or not (path.parent / INDEX).is_file():
            return
        other = self.chance.choice([e for e in SIZES if e != path.stem])
        pickled = pickle.dumps({"network": Opens(self.root / "opened")}, protocol=2)
        torch.save(state_of(other, 30), self.root / "foreign.pt")
        foreign = (self.root / "foreign.pt").read_bytes()
        path.write_bytes(self.chance.choice((b"", b"garbage", pickled, foreign)))
        try:
            index = read_json(path.parent / INDEX)
        except Exception:
            return
        if isinstance(index.get("entries"), dict):
            index["entries"][path.stem] = f"crc32:{file_crc32(path):08x}"
            write_json(path.parent / INDEX, index)
            self.forged.add(path.parent.name)

    def stray(self) -> None:
        name = self.chance.choice(
            ("notes.txt", ".tmp-host-1", "step-000000040-g1", "step-9", "a.pt")
        )
        path = self.folder / name
        if not os.path.lexists(path):
            make = self.chance.choice((Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")))
            make(path)

    def replace_by_folder(self) -> None:
        if path := self.file():
            path.unlink()
            make = self.chance.choice((Path.mkdir, lambda p: p.symlink_to("nowhere")))
            make(path)


def intact(folder: Path, whole: Path, step: int, number: int, entry: str) -> bool:
    """Return whether an entry's file and its index have the bytes that were written."""
    name = f"step-{step:09d}-g{number}"
    return all(
        (folder / name / file).is_file()
        and (folder / name / file).read_bytes() == (whole / name / file).read_bytes()
        for file in (INDEX, f"{entry}.pt")
    )


def is_flawed(path: Path, wanted: str, whole: Path, forged: Collection[str]) -> bool:
    """Return whether a checkpoint, by its name, differs from the one saved for an entry."""
    try:
        index = json.loads((path / INDEX).read_bytes())
        written = json.loads((whole / path.name / INDEX).read_bytes())
        for record in (index, written):
            record.pop("above", None)  # a shortcut to the comparison of the rest
        if index != written and path.name not in forged:
            return True
        files = [f"{entry}.pt" for entry in wanted if entry in index["entries"]]
        return any((path / f).read_bytes() != (whole / path.name / f).read_bytes() for f in files)
    except (OSError, ValueError, AttributeError, TypeError):
        return True


def files_below(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@fuzzed(
    0.15,
    number=st.integers(0, 2**64 - 1),
    wanted=st.sampled_from(["a", "b", "c", "ab", "abc"]),
    finished=st.sampled_from(["", "", "a", "c", "ab"]),
)
def test_a_job_goes_on_from_what_was_saved_whatever_happened(number, wanted, finished, whole):
    root = whole.parent / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    folder = root / "ours"
    accidents = Accidents(root, random.Random(number))
    accidents.happen()

    before = {
        (step, generation, entry)
        for step, generation, entries in SAVED
        for entry in entries
        if intact(folder, whole / "ours", step, generation, entry)
    }
    step, states, _, problems = checkpoint.load_latest(folder, wanted, fits)
    assert step in (0, 20, 30)
    assert sorted(states) == (sorted(wanted) if step else [])
    assert all(equal(states[entry], state_of(entry, step)) for entry in states)
    best = [s for s in (20, 30) if set(wanted) <= {e for at, _, e in before if at == s}]
    assert step >= max(best, default=0)
    for problem in problems:
        assert one_line(problem) == problem and str(folder) in problem
    later = [p for p in folder.iterdir() if NAME.fullmatch(p.name) and int(p.name[5:14]) > step]
    for path in later:
        if is_flawed(path, wanted, whole / "ours", accidents.forged):
            assert any(str(path) in problem for problem in problems), (path, problems)

    for entry, found in checkpoint.newest(folder).items():
        assert (found.step, entry) in {(at, e) for at, _, entries in SAVED for e in entries}
    strays = {path: content for path, content in files_below(folder).items()
              if not NAME.fullmatch(path.relative_to(folder).parts[0])}  # fmt: skip
    everybody = Generation(root / "generations/ours", 7, frozenset("abc"))
    checkpoint.prune(folder, everybody, finished)
    for at, generation, entry in before:
        assert entry in finished or intact(folder, whole / "ours", at, generation, entry)
    assert strays.items() <= files_below(folder).items()
    left, *_ = checkpoint.load_latest(folder, set(wanted) - set(finished), fits)
    assert left >= step or set(wanted) <= set(finished)
    assert not (root / "opened").exists()
