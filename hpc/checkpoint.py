"""Checkpoints: one folder a (step, generation) that appears by one rename, with one entry a unit
of work, so that units come and go without touching each other's progress.

    FOLDER/step-000000120-g3/ENTRY.pt, index.json

An entry holds tensors and plain values only. The index is read without torch, by planning too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.atomic import (
    Damaged,
    file_sha256,
    new_file,
    new_folder,
    read_json,
    remove_dead_folders,
    remove_folder,
    write_json,
)
from hpc.generation import Generation

KEPT = 2  # of each entry: the newest, and one to fall back to
_NAME = re.compile(r"step-(\d{9})-g(\d+)")
_INDEX = "index.json"


@dataclass(frozen=True)
class Checkpoint:
    """One folder: the step it was written after, by which generation, and each entry's hash."""

    path: Path
    step: int
    generation: int
    hashes: Mapping[str, str]
    record: Mapping[str, Any]

    def load(self, entry: str) -> dict[str, Any]:
        """The state saved for `entry`. Raises `Damaged` if its file is not as written."""
        import torch  # planning reads indices and must not pay for it

        path = self.path / f"{entry}.pt"
        try:
            if file_sha256(path) != self.hashes[entry]:
                raise Damaged(f"{path} is damaged (its checksum does not fit)")
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from error
        return torch.load(path, map_location="cpu", weights_only=True)


def save(
    folder: Path,
    step: int,
    generation: Generation,
    entries: Mapping[str, Mapping[str, Any]],
    record: Mapping[str, Any],
) -> None:
    """Publish a checkpoint of `entries` after `step`, then prune older ones. `record` holds plain
    values that describe all entries. Raises `Superseded` if another start has taken over.
    """
    generation.check()
    path = folder / f"step-{step:09d}-g{generation.number}"
    if path.exists():  # the same start at the same step: the same state
        return
    with new_folder(path) as temporary:
        for name, state in entries.items():
            _dump(state, temporary / f"{name}.pt")
        hashes = {name: file_sha256(temporary / f"{name}.pt") for name in entries}
        write_json(
            temporary / _INDEX,
            {"step": step, "generation": generation.number, "entries": hashes, **record},
        )
        generation.check()
    prune(folder, generation, finished=())


def write_tensors(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values as one file that appears whole and that `torch.load` reads
    with `weights_only=True`."""
    with new_file(path) as temporary:
        _dump(state, temporary)


def _dump(state: Mapping[str, Any], path: Path) -> None:
    import torch

    with path.open("wb") as file:  # a path's name would become part of the content
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
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        try:
            index = read_json(path / _INDEX)
        except Damaged as error:
            problems.append(str(error))
        except FileNotFoundError:
            problems.append(f"{path} has no {_INDEX}")
        else:
            hashes = index.pop("entries")
            found.append(Checkpoint(path, int(match[1]), int(match[2]), hashes, index))
    found.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.generation), reverse=True)
    return found, problems


def newest_steps(folder: Path) -> dict[str, int]:
    """The newest step that each entry of a folder was saved at."""
    steps: dict[str, int] = {}
    for checkpoint in find(folder)[0]:
        for entry in checkpoint.hashes:
            steps.setdefault(entry, checkpoint.step)
    return steps


def load_latest(
    folder: Path, entries: Iterable[str]
) -> tuple[int, dict[str, dict[str, Any]], list[Mapping[str, Any]], list[str]]:
    """The newest step at which all `entries` have an intact checkpoint, with their states, the
    records of the folders they lie in, and a line for each damaged file that was passed over.
    Step 0 and no states where there is none, or nothing is wanted. Entries may lie in different
    folders of the same step.
    """
    wanted = list(entries)
    checkpoints, problems = find(folder) if wanted else ([], [])
    for step in sorted({checkpoint.step for checkpoint in checkpoints}, reverse=True):
        states: dict[str, dict[str, Any]] = {}
        records: list[Mapping[str, Any]] = []
        for checkpoint in (c for c in checkpoints if c.step == step):
            for entry in wanted:
                if entry in checkpoint.hashes and entry not in states:
                    try:
                        states[entry] = checkpoint.load(entry)
                        if checkpoint.record not in records:
                            records.append(checkpoint.record)
                    except Damaged as error:
                        problems.append(str(error))
        if len(states) == len(wanted):
            return step, states, records, problems
    return 0, {}, [], problems


def prune(folder: Path, generation: Generation, finished: Iterable[str]) -> None:
    """Delete the checkpoints that no entry needs: an entry needs its `KEPT` newest until it is
    `finished`. Only folders whose entries are all ours are touched, none written by a later
    generation, and nothing at all once this generation has a successor."""
    done = frozenset(finished)
    seen: dict[str, int] = {}
    for checkpoint in find(folder)[0]:
        needed = False
        for entry in checkpoint.hashes:
            seen[entry] = seen.get(entry, 0) + 1
            needed |= entry not in done and seen[entry] <= KEPT
        ours = generation.entries.issuperset(checkpoint.hashes)
        if ours and not needed and checkpoint.generation <= generation.number:
            generation.check()
            remove_folder(checkpoint.path)
    remove_dead_folders(folder)
