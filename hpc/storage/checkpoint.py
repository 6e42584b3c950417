"""Write and read checkpoints: one folder per (step, generation), with one entry per unit of work.

    FOLDER/step-000000120-g3/ENTRY.pt, index.json

A folder appears by one rename. Entries are independent: adding or removing one leaves the files of
the others as they are. An entry holds tensors and plain values only. The index is read without
torch, since planning reads it too. It names its own folder, step and generation, so that a copied
or renamed index is refused.
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
    unreadable,
    write_json,
)
from hpc.storage.checksum import SummingFile, file_crc32
from hpc.storage.fencing import Generation

KEPT = 2  # checkpoints of each entry: the newest, and one to fall back to
_NAME = re.compile(r"step-(\d{9})-g(\d+)")
_INDEX = "index.json"

# Called with entry and state: returns whether the state has the entry's names, shapes and types.
StateMatches = Callable[[str, Any], bool]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder."""

    path: Path
    step: int  # number of steps done
    generation: int  # the generation that wrote it
    checksums: Mapping[str, str]  # by entry
    record: Mapping[str, Any]  # plain values that describe all entries

    def load(self, entry: str, state_matches: StateMatches) -> Any:
        """Return the state saved for `entry`.

        Raises:
            Damaged: the file is not as it was written, or `state_matches` returns False.
        """
        import torch  # planning reads indices and must not load torch

        path = self.path / f"{entry}.pt"
        try:
            if _checksum(file_crc32(path)) != self.checksums[entry]:
                raise Damaged(f"{path} is damaged (its checksum differs)")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Damaged:
            raise
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from error
        except Exception as error:  # torch raises many types for a file of another program
            kind = type(error).__name__
            raise Damaged(
                f"{path} was not written by lossgrid (as a state it gives {kind})"
            ) from error
        if not state_matches(entry, state):
            raise Damaged(f"{path} does not match (its state has other names, shapes or types)")
        return state


def save(
    folder: Path,
    step: int,
    generation: Generation,
    entries: Mapping[str, Mapping[str, Any]],
    record: Mapping[str, Any],
    resumed: int | None = None,
) -> None:
    """Publish a checkpoint of `entries` after `step`, then prune older ones.

    Args:
        folder: where checkpoints lie.
        step: number of steps done.
        generation: the claim of this start.
        entries: the states to save, of tensors and plain values. Each is read once, in order, and
            not held beyond its file: a mapping may make a state when it is read.
        record: plain values that describe all entries.
        resumed: as for `prune`.

    Raises:
        Superseded: a later start has taken over.
        UserError: the checkpoint cannot be written.
    """
    generation.check()
    path = folder / f"step-{step:09d}-g{generation.number}"
    if path.exists():  # this start has saved this step already
        return
    with new_folder(path, generation.check) as temporary:
        checksums = _dump_entries(entries, temporary)
        write_json(temporary / _INDEX, {**record, **_location(path), "entries": checksums})
    prune(folder, generation, finished=(), resumed=resumed)


def write_tensors(path: Path, state: Mapping[str, Any], check: Check | None = None) -> None:
    """Write tensors and plain values as one file that appears whole, unless `check` raises.

    `torch.load` reads it with `weights_only=True`.
    """
    with new_file(path, check) as temporary, temporary.open("wb") as file:
        _dump(state, file)


def _dump_entries(entries: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, str]:
    """Write a file for each entry and return their checksums.

    While one file is written, a thread flushes the previous one to disk.
    """
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and planning imports us

    checksums, synced = {}, []
    with ThreadPoolExecutor(1) as syncer, _without_crc32():
        for name in entries:
            path = folder / f"{name}.pt"
            with path.open("wb") as file:
                summing = SummingFile(file)
                _dump(entries[name], cast(BinaryIO, summing))
            checksums[name] = _checksum(summing.crc32)
            synced.append(syncer.submit(fsync, path))
        for one in synced:
            one.result()
    return checksums


def _checksum(crc32: int) -> str:
    return f"crc32:{crc32:08x}"


@contextmanager
def _without_crc32() -> Iterator[None]:
    # torch's own checksums take half of the time to save, and the index has one of the whole file
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _dump(state: Mapping[str, Any], file: BinaryIO) -> None:
    import torch

    try:
        torch.save(dict(state), file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides that the disk is full
            raise error.__context__ from error
        raise


def find(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """Return all checkpoints of a folder, newest first, and a line for each unreadable one.

    Raises:
        UserError: the folder exists and cannot be read.
    """
    found, problems = [], []
    for path in _paths(folder):
        if _NAME.fullmatch(path.name) is None:
            continue
        try:
            found.append(_read(path))
        except Damaged as error:
            problems.append(str(error))
    found.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.generation), reverse=True)
    return found, problems


def _paths(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(error, folder) from error


def _read(path: Path) -> Checkpoint:
    try:
        index = read_json(path / _INDEX)
    except FileNotFoundError as error:
        raise Damaged(f"{path} has no {_INDEX}") from error
    location = _location(path)
    checksums = index.pop("entries", None)
    if {key: index.pop(key, None) for key in location} != location or not _are_texts(checksums):
        raise Damaged(f"{path / _INDEX} does not match (it is not the index of this checkpoint)")
    return Checkpoint(path, location["step"], location["generation"], checksums, index)


def _are_texts(checksums: Any) -> bool:
    return isinstance(checksums, dict) and set(map(type, checksums.values())) <= {str}


def _location(path: Path) -> dict[str, Any]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return {"folder": path.parent.name, "step": int(match[1]), "generation": int(match[2])}


def newest(folder: Path) -> dict[str, Checkpoint]:
    """Return the newest checkpoint of each entry of a folder."""
    found: dict[str, Checkpoint] = {}
    for checkpoint in find(folder)[0]:
        for entry in checkpoint.checksums:
            found.setdefault(entry, checkpoint)
    return found


def load_latest(
    folder: Path,
    entries: Iterable[str],
    state_matches: StateMatches = lambda _entry, state: isinstance(state, dict),
    max_step: int | None = None,
) -> tuple[int, dict[str, dict[str, Any]], list[Mapping[str, Any]], list[str]]:
    """Load the newest step at which all `entries` have an intact checkpoint.

    Entries may lie in different folders of the same step.

    Args:
        folder: where checkpoints lie.
        entries: the names of the wanted states.
        state_matches: says whether a state is the entry's own; others are passed over.
        max_step: the largest step to consider; None for no limit.

    Returns:
        (step, states by entry, records of their folders, a line for each file passed over).
        Step 0 and no states if there is no such step or no entry is wanted.
    """
    wanted = list(entries)
    checkpoints, problems = find(folder) if wanted else ([], [])
    steps = {c.step for c in checkpoints if max_step is None or c.step <= max_step}
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
    """Delete checkpoints that the entries of `generation` no longer need.

    Entries of other claims and folders of a later generation are not touched.

    Args:
        folder: where checkpoints lie.
        generation: the claim of this start.
        finished: entries that need no checkpoint; the others need their `KEPT` newest.
        resumed: the step from which this start resumed. Checkpoints of earlier starts beyond it
            were damaged or not shared by all entries, and are deleted.

    Raises:
        Superseded: a later start has taken over; nothing more is deleted.
    """
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
    """Delete the files of `entries`, and the folder if no other entry is left in it."""
    files = {entry: checkpoint.path / f"{entry}.pt" for entry in checkpoint.checksums}
    if any(files[entry].exists() for entry in files.keys() - set(entries)):
        for entry in entries:
            if not files[entry].is_dir():  # a folder is not ours
                remove_file(files[entry])
    else:
        remove_folder(checkpoint.path)
