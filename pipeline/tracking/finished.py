"""Read which cells are done from the files of counts and their indices."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from hpc.storage.atomic import Damaged
from jobs.spec.counts_file import CountsIndex, read_index
from jobs.spec.run_paths import RunPaths
from pipeline.tracking.submissions import json_files


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Switch garbage collection off. A survey keeps thousands of records, and the search for
    garbage among them takes half of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@garbage_collection_paused()
def finished_cells(run: RunPaths, verify: bool = False) -> tuple[dict[str, CountsIndex], list[str]]:
    """Return the index of the counts of each finished cell, by signature, and a line for each
    damaged file. Sizes are compared; with `verify`, checksums too."""
    done: dict[str, CountsIndex] = {}
    problems, broken = [], []
    for path in json_files(run.counts):
        try:
            index = read_index(path)
        except FileNotFoundError:  # a link to nowhere, or deleted meanwhile
            problems.append(f"{path} is not there; its cells count as missing")
            continue
        except Damaged as error:
            problems.append(str(error))
            continue
        if not index.is_whole():
            broken.append(index)
            continue
        if verify and index.is_altered():
            problems.append(
                f"{index.path} is damaged (its checksum differs); run grid again to retrain "
                "its cells"
            )
            continue
        done |= dict.fromkeys(index.signatures, index)
    problems += [
        f"{index.path} is missing or cut short; run grid again to retrain its cells"
        for index in broken
        if not done.keys() >= set(index.signatures)  # else counted again
    ]
    return done, problems
