"""Plan which samples go into which shard, before any pixel is decoded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.images import BadFile, read_header
from data_prep.settings import DatasetSettings
from data_prep.shards.format import Entry
from data_prep.shards.manifest import FORMAT, SPLITS
from data_prep.sources import source_module
from data_prep.sources.files import Sample
from hpc.cli import UserError
from hpc.storage.atomic import fingerprint

MEGABYTE = 1_000_000
_PACKING_VERSION = 2  # raise it when a change of the program gives other pixels, labels or records
_HEADER_THREADS = 8  # reading headers is mostly waiting for a parallel file system


@dataclass(frozen=True)
class PlannedSample:
    """A sample and its entry in a shard's index, made from the image's header."""

    sample: Sample
    entry: Entry


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be packed. `stamp` changes if its source files or settings do."""

    settings: DatasetSettings
    split: str
    number: int
    samples: tuple[PlannedSample, ...]
    stamp: str

    @property
    def folder(self) -> Path:
        """Return the folder of the shard."""
        return Path(self.settings.shards)

    @property
    def stem(self) -> str:
        """Return the common start of the file names of shard and record."""
        return f"{self.split}-{self.number:05d}"

    @property
    def record_path(self) -> Path:
        """Return the path of the small file beside the shard that marks it as done."""
        return self.folder / f"{self.stem}.json"

    @property
    def bytes(self) -> int:
        """Return the bytes of its arenas."""
        return sum(_arena_bytes(planned.entry) for planned in self.samples)


@dataclass(frozen=True)
class PackingPlan:
    """All shards of a data set, and the samples with bad headers."""

    shards: tuple[ShardPlan, ...]
    bad: dict[str, tuple[str, ...]]  # by split, one message per sample


@dataclass(frozen=True)
class SourceFiles:
    """The files of a data set as they are now; none was opened."""

    settings: DatasetSettings
    classes: tuple[str, ...]
    samples: dict[str, list[Sample]]
    stamps: dict[str, list[list[Any]]]  # by split: names, sizes, times, annotation of each sample

    @property
    def stamp(self) -> str:
        """Return a hash that changes if any file or relevant setting does."""
        return _stamp(self.settings, list(self.stamps.items()))


def find_source(settings: DatasetSettings) -> SourceFiles:
    """List the source's files, after checking or making them.

    Raises:
        UserError: files are missing, do not pair or cannot be read.
    """
    module = source_module(settings.source)
    if hasattr(module, "prepare"):
        module.prepare(settings)
    samples = {split: module.samples(settings, split) for split in SPLITS}
    stamps = {split: [_sample_stamp(s) for s in samples[split]] for split in SPLITS}
    return SourceFiles(settings, module.classes(settings), samples, stamps)


def plan_shards(source: SourceFiles) -> PackingPlan:
    """Divide the samples, sorted by id, into shards of about `shard_mb`, by their headers."""
    shards: list[ShardPlan] = []
    bad: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        stamps = {s.id: t for s, t in zip(source.samples[split], source.stamps[split], strict=True)}
        planned, bad[split] = _read_headers(source, split)
        for number, group in enumerate(_cut(planned, source.settings.shard_mb * MEGABYTE)):
            stamp = _stamp(source.settings, [stamps[p.sample.id] for p in group])
            shards.append(ShardPlan(source.settings, split, number, tuple(group), stamp))
    return PackingPlan(tuple(shards), bad)


def check_room(folder: Path, needed: int) -> None:
    """Make `folder`, and check that there is space for `needed` bytes.

    Raises:
        UserError: the folder cannot be written to, or there is too little space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {folder}: no permission; set shards to another folder")
    if needed > free:
        raise UserError(
            f"no room for the shards in {folder}: {_gigabytes(needed)} needed, "
            f"{_gigabytes(free)} free; make room, or set shards to a folder on another disk"
        )


def _read_headers(source: SourceFiles, split: str) -> tuple[list[PlannedSample], tuple[str, ...]]:
    def read(sample: Sample) -> PlannedSample | str:
        try:
            return PlannedSample(sample, _entry(sample, source.settings.codec))
        except BadFile as error:
            return str(error)

    with ThreadPoolExecutor(_HEADER_THREADS) as threads:
        found = list(threads.map(read, source.samples[split]))
    planned = [one for one in found if isinstance(one, PlannedSample)]
    return planned, tuple(one for one in found if isinstance(one, str))


def _entry(sample: Sample, codec: str) -> Entry:
    header = read_header(sample.image)
    height, width = header.height, header.width
    if codec == "raw" or (codec == "auto" and not header.keeps_jpeg):
        return Entry(sample.id, height, width, "raw", height * width * 3)
    if not header.keeps_jpeg:
        raise BadFile(
            f'{sample.image} is not an RGB or grey JPEG, as codec = "encoded" requires; '
            'set codec = "auto" or "raw"'
        )
    return Entry(sample.id, height, width, "encoded", _stat(sample.image)[0])


def _cut(planned: Iterable[PlannedSample], limit: int) -> Iterable[list[PlannedSample]]:
    group: list[PlannedSample] = []
    filled = 0
    for one in planned:
        size = _arena_bytes(one.entry)
        if group and filled + size > limit:
            yield group
            group, filled = [], 0
        group.append(one)
        filled += size
    if group:
        yield group


def _arena_bytes(entry: Entry) -> int:
    return entry.pixels.size + entry.labels.size


def _stamp(settings: DatasetSettings, content: list[Any]) -> str:
    return fingerprint(
        [FORMAT, _PACKING_VERSION, settings.identity(), settings.codec, settings.shard_mb, content]
    )


def _sample_stamp(sample: Sample) -> list[Any]:
    image = [sample.image.name, *_stat(sample.image)]
    if sample.annotation:  # the time of the common file would change all samples at once
        return [sample.id, image, fingerprint(sample.annotation)]
    return [sample.id, image, [sample.label.name, *_stat(sample.label)]]


def _stat(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
