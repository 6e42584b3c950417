"""Measure reading an image and its label map in one process, with all files in the page cache.

The peers of our shards are a folder and a tar of PNG files, and MosaicML Streaming's shards of PNG
files and of raw arrays (`benchmarks/readers.py`). Only ours compares every byte with
a checksum.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from unittest.mock import patch

import numpy as np

from benchmarks.measure import NotMeasured, Result, compare, copy_bandwidth, time_in_turns
from benchmarks.pictures import PictureSet, on_all
from benchmarks.readers import NEEDS, STREAMING_RAW, Pairs, readers, why_absent
from data_prep.shards import reader as shards
from hpc.distributed.allocator import keep_freed_memory
from hpc.storage.checksum import crc32

TARGET, TARGET_RAW = 100.0, 2.0
ROUNDS = 5
WHAT = "read and decode, one process"
OTHERS = ("torchvision, PNG folder", *NEEDS)


def measure() -> list[Result]:
    """Compare the seconds per image and label map, with the allocator of a job's loaders."""
    keep_freed_memory()
    return on_all(_compared, _no_camvid)


def _compared(pictures: PictureSet) -> list[Result]:
    what = f"{WHAT}, {pictures.name}"
    peers = readers(pictures)
    for name, start in peers.items():
        _check_same(_ours(pictures), start(), name)
    found: list[Result] = list(
        compare(
            what,
            partial(_drain, partial(_ours, pictures)),
            {name: (partial(_drain, start), _target(name)) for name, start in peers.items()},
            rounds=ROUNDS,
            limit=_limit(pictures),
            units=len(pictures.reader),
            more=_more(pictures),
        )
    )
    return found + [NotMeasured(what, name, why) for name in OTHERS if (why := why_absent(name))]


def _no_camvid() -> list[Result]:
    return [NotMeasured(f"{WHAT}, CamVid", name, "CamVid is not here") for name in OTHERS]


def _target(peer: str) -> float:
    return TARGET_RAW if peer == STREAMING_RAW else TARGET


def _ours(pictures: PictureSet) -> Pairs:
    reader = pictures.reader
    for i in range(len(reader)):
        yield reader.image(i), reader.label(i)


def _drain(start: Callable[[], Iterable[object]]) -> None:
    deque(start(), maxlen=0)  # keeps no pair in memory while the next is read


def _check_same(ours: Pairs, theirs: Pairs, peer: str) -> None:
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        same = all(np.array_equal(a, b) for a, b in zip(mine, other, strict=True))
        assert same, f"{peer} gives other pixels than ours for picture {number}"


def _pair_bytes(pictures: PictureSet) -> float:
    reader = pictures.reader
    sizes = [height * width for height, width in map(reader.size, range(len(reader)))]
    return 4 * sum(sizes) / len(sizes)  # 3 bytes of the image and 1 of the label map


def _limit(pictures: PictureSet) -> str:
    size, rate = _pair_bytes(pictures), copy_bandwidth() / 2
    return f"copying {size / 1e6:.2f} MB at {rate / 1e9:.1f} GB/s: {size / rate * 1e3:.3g} ms"


def _more(pictures: PictureSet) -> dict[str, float | str]:
    """Return the cost of the checks, and the bytes per pixel of PNG."""
    ours, units = partial(_drain, partial(_ours, pictures)), len(pictures.reader)

    def unchecked() -> None:
        with patch.object(shards._Arena, "_check", lambda *_: None):
            ours()

    found = time_in_turns({"with CRCs": ours, "without": unchecked}, ROUNDS)
    seconds = {f"ours {how}, s": statistics.median(s) / units for how, s in found.items()}
    return {
        "PNG bytes a pixel": round(pictures.png_bytes_per_pixel, 2),
        "CRCs by": crc32.__module__ or "",
        **seconds,
    }
