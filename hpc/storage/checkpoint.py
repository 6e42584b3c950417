"""Checkpoints: one folder a (step, generation) that appears by one rename, with one entry a unit
of work, so that units come and go without touching each other's progress.

    FOLDER/step-000000120-g3/ENTRY.pt, index.json

An entry holds tensors and plain values only. The index is read without torch, by planning too; it
names its own place, so that one that was copied or renamed is not taken for what it is not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from hpc.storage.atomic import (
    Check,
    Damaged,
    fsync,
    new_file,
    new_folder,
    read_json,
    remove_dead_folders,
    remove_file,
    remove_folder,
    write_json,
)
from hpc.storage.checksum import SummingFile, file_crc32
from hpc.storage.fencing import Generation

KEPT = 2  # of each entry: the newest, and one to fall back to
_NAME = re.compile(r"step-(\d{9})-g(\d+)")
_INDEX = "index.json"

# Whether a state that was read is one of the entry's own: names, shapes, types.
StateMatches = Callable[[str, Any], bool]


@dataclass(frozen=True)
class Checkpoint:
    """One folder: the step it was written after, by which generation, and each entry's checksum."""

    path: Path
    step: int
    generation: int
    checksums: Mapping[str, str]
    record: Mapping[str, Any]

    def load(self, entry: str, state_matches: StateMatches) -> Any:
        """The state saved for `entry`. Raises `Damaged` if its file is not as written, or its state
        does not fit."""
        import torch  # planning reads indices and must not pay for it

        path = self.path / f"{entry}.pt"
        try:
            if _checksum(file_crc32(path)) != self.checksums[entry]:
                raise Damaged(f"{path} is damaged (its checksum does not fit)")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Damaged:
            raise
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from error
        except Exception as error:  # torch raises many kinds for a file that is not its own
            kind = type(error).__name__
            raise Damaged(f"{path} is foreign (as a state it gives {kind})") from error
        if not state_matches(entry, state):
            raise Damaged(f"{path} is foreign (its state has other names, shapes or types)")
        return state


def save(
    folder: Path,
    step: int,
    generation: Generation,
    entries: Mapping[str, Mapping[str, Any]],
    record: Mapping[str, Any],
    resumed: int | None = None,
) -> None:
    """Publish a checkpoint of `entries` after `step`, then prune older ones. `record` holds plain
    values that describe all entries; `resumed` is as for `prune`. Raises `Superseded` if another
    start has taken over.
    """
    generation.check()
    path = folder / f"step-{step:09d}-g{generation.number}"
    if path.exists():  # the same start at the same step: the same state
        return
    with new_folder(path, generation.check) as temporary:
        checksums = _dump_entries(entries, temporary)
        write_json(temporary / _INDEX, {**record, **_place(path), "entries": checksums})
    prune(folder, generation, finished=(), resumed=resumed)


def write_tensors(path: Path, state: Mapping[str, Any], check: Check | None = None) -> None:
    """Write tensors and plain values as one file that appears whole, unless `check` raises, and
    that `torch.load` reads with `weights_only=True`."""
    with new_file(path, check) as temporary, temporary.open("wb") as file:
        _dump(state, file)


def _dump_entries(entries: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, str]:
    """Write a file for each entry; their checksums. While one is written the one before goes to
    disk."""
    from concurrent.futures import ThreadPoolExecutor  # with logging: planning reads checkpoints

    checksums, synced = {}, []
    with ThreadPoolExecutor(1) as syncer, _without_crc32():
        for name, state in entries.items():
            path = folder / f"{name}.pt"
            with path.open("wb") as file:
                summing = SummingFile(file)
                _dump(state, cast(BinaryIO, summing))
            checksums[name] = _checksum(summing.crc32)
            synced.append(syncer.submit(fsync, path))
        for one in synced:
            one.result()
    return checksums


def _checksum(crc32: int) -> str:
    return f"crc32:{crc32:08x}"


@contextmanager
def _without_crc32() -> Iterator[None]:
    """torch's own checksums cost half of its time, and a checkpoint has one of the whole file."""
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _dump(state: Mapping[str, Any], file: BinaryIO) -> None:
    """torch gets a file, not a path, whose name would become part of the content."""
    import torch

    try:
        torch.save(dict(state), file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides that the disk is full
            raise error.__context__ from error
        raise


def find(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """All checkpoints of a folder, newest first, and a line for each that cannot be read."""
    found, problems = [], []
    for path in folder.iterdir() if folder.is_dir() else ():
        if _NAME.fullmatch(path.name) is None:
            continue
        try:
            found.append(_read(path))
        except Damaged as error:
            problems.append(str(error))
    found.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.generation), reverse=True)
    return found, problems


def _read(path: Path) -> Checkpoint:
    try:
        index = read_json(path / _INDEX)
    except FileNotFoundError as error:
        raise Damaged(f"{path} has no {_INDEX}") from error
    place = _place(path)
    checksums = index.pop("entries", None)
    if {key: index.pop(key, None) for key in place} != place or not _are_texts(checksums):
        raise Damaged(f"{path / _INDEX} is foreign (it is not the index of this checkpoint)")
    return Checkpoint(path, place["step"], place["generation"], checksums, index)


def _are_texts(checksums: Any) -> bool:
    return isinstance(checksums, dict) and set(map(type, checksums.values())) <= {str}


def _place(path: Path) -> dict[str, Any]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return {"folder": path.parent.name, "step": int(match[1]), "generation": int(match[2])}


def newest(folder: Path) -> dict[str, Checkpoint]:
    """The newest checkpoint of each entry of a folder."""
    found: dict[str, Checkpoint] = {}
    for checkpoint in find(folder)[0]:
        for entry in checkpoint.checksums:
            found.setdefault(entry, checkpoint)
    return found


def load_latest(
    folder: Path,
    entries: Iterable[str],
    state_matches: StateMatches = lambda _entry, state: isinstance(state, dict),
    newest: int | None = None,
) -> tuple[int, dict[str, dict[str, Any]], list[Mapping[str, Any]], list[str]]:
    """The newest step, up to `newest`, at which all `entries` have an intact checkpoint whose state
    fits, with their states, the records of the folders they lie in, and a line for each damaged or
    foreign file that was passed over. Step 0 and no states where there is none, or nothing is
    wanted. Entries may lie in different folders of the same step.
    """
    wanted = list(entries)
    checkpoints, problems = find(folder) if wanted else ([], [])
    steps = {c.step for c in checkpoints if newest is None or c.step <= newest}
    for step in sorted(steps, reverse=True):
        states: dict[str, dict[str, Any]] = {}
        records: list[Mapping[str, Any]] = []
        for checkpoint in (c for c in checkpoints if c.step == step):
            for entry in wanted:
                if entry in checkpoint.checksums and entry not in states:
                    try:
                        states[entry] = checkpoint.load(entry, state_matches)
                        if checkpoint.record not in records:
                            records.append(checkpoint.record)
                    except Damaged as error:
                        problems.append(str(error))
        if len(states) == len(wanted):
            return step, states, records, problems
    return 0, {}, [], problems


def prune(
    folder: Path, generation: Generation, finished: Iterable[str], resumed: int | None = None
) -> None:
    """Delete what the entries of `generation` need no more: an entry needs its `KEPT` newest until
    it is `finished`. `resumed` is the step that this start went on from: what older starts left
    beyond it was damaged, or not shared by all entries, and counts for nothing. Entries of others
    and folders of a later generation are not touched, and nothing at all once this generation has
    a successor."""
    generation.check()
    done = frozenset(finished)
    seen: Counter[str] = Counter()
    for checkpoint in find(folder)[0]:
        older = checkpoint.generation < generation.number
        passed_over = older and resumed is not None and checkpoint.step > resumed
        ours = generation.entries.intersection(checkpoint.checksums)
        if not passed_over:
            seen.update(ours)
        unneeded = {e for e in ours if passed_over or e in done or seen[e] > KEPT}
        if unneeded and checkpoint.generation <= generation.number:
            generation.check()
            _drop(checkpoint, unneeded)
    remove_dead_folders(folder)


def _drop(checkpoint: Checkpoint, entries: Collection[str]) -> None:
    """Delete the files of `entries`; the last of a folder take it with them."""
    files = {entry: checkpoint.path / f"{entry}.pt" for entry in checkpoint.checksums}
    if any(files[entry].exists() for entry in files.keys() - set(entries)):
        for entry in entries:
            if not files[entry].is_dir():  # that is none of ours
                remove_file(files[entry])
    else:
        remove_folder(checkpoint.path)
