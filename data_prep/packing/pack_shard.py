"""Pack one shard: the unit of work of a process or MPI rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from data_prep.images import BadFile, decode_rgb, read_bytes
from data_prep.packing.shard_plan import PlannedSample, ShardPlan
from data_prep.settings import VOID
from data_prep.shards.manifest import ShardSummary, shard_name
from data_prep.shards.writer import ShardWriter
from data_prep.sources import source_module
from hpc.storage.atomic import Damaged, file_sha256, new_file, read_json, write_json


@dataclass(frozen=True)
class PackedShard:
    """The result of packing one shard."""

    split: str
    number: int
    summary: ShardSummary | None  # None: not written, because of bad samples
    bad: tuple[str, ...]  # one message per sample that cannot be packed
    contents: tuple[str, ...]  # a hash of the bytes or pixels of each packed image


def already_packed(plan: ShardPlan, skip_bad: bool) -> PackedShard | None:
    """Return the result of an earlier run, if the shard exists and its source is unchanged."""
    try:
        record = read_json(plan.record_path)
        if record["stamp"] != plan.stamp or (record["left_out"] and not skip_bad):
            return None
        kept = record["summary"]
        summary = ShardSummary.from_record(kept) if kept else None
        contents = tuple(record["contents"])
        if summary and (plan.folder / summary.file).stat().st_size != summary.bytes:
            return None
    except (OSError, Damaged, KeyError, TypeError):
        return None
    return PackedShard(plan.split, plan.number, summary, tuple(record["left_out"]), contents)


def pack_shard(plan: ShardPlan, skip_bad: bool) -> PackedShard:
    """Write the shard and then its record, each in one step.

    Bad samples are left out with `skip_bad`. Without it, nothing is written if there are any, and
    the result lists them all.

    Raises:
        UserError: a file cannot be written, or there is not enough memory.
    """
    samples, bad = plan.samples, dict[str, str]()
    while samples:
        try:
            summary, contents = _write(samples, plan)
            break
        except _BadSamples as found:
            bad |= found.reasons
            samples = tuple(p for p in samples if p.sample.id not in bad)
            if not skip_bad:
                return PackedShard(plan.split, plan.number, None, tuple(bad.values()), ())
    else:
        summary, contents = None, ()
    packed = PackedShard(plan.split, plan.number, summary, tuple(bad.values()), contents)
    _write_record(plan, packed)
    return packed


class _BadSamples(Exception):
    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def _write(
    samples: Sequence[PlannedSample], plan: ShardPlan
) -> tuple[ShardSummary, tuple[str, ...]]:
    num_classes = len(source_module(plan.settings.source).classes(plan.settings))
    file = ""
    with new_file(plan.folder / f"{plan.stem}.h5", final=lambda: plan.folder / file) as temporary:
        with ShardWriter(temporary, [p.entry for p in samples]) as writer:
            contents, counts = _add_samples(writer, samples, plan)
        sha256 = file_sha256(temporary)
        file = shard_name(plan.stem, sha256)
        summary = ShardSummary(
            file=file,
            bytes=temporary.stat().st_size,
            sha256=sha256,
            arenas=writer.arenas,
            frame_sha256=writer.frame_sha256,
            ids=tuple(p.sample.id for p in samples),
            sizes=tuple((p.entry.height, p.entry.width) for p in samples),
            class_pixels=tuple(int(n) for n in counts[:num_classes]),
            void_pixels=int(counts[VOID]),
        )
        return summary, contents


def _add_samples(
    writer: ShardWriter, samples: Sequence[PlannedSample], plan: ShardPlan
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Add all samples; return a hash of each image, and the pixels of each label value."""
    counts = np.zeros(256, np.int64)
    contents: list[str] = []
    reasons: dict[str, str] = {}
    for planned in samples:
        try:
            pixels, label = read_sample(planned, plan)
        except BadFile as error:
            reasons[planned.sample.id] = str(error)
            continue
        if not reasons:  # after the first bad sample the others are only checked
            writer.add(pixels, label)
            contents.append(_content(planned, pixels))
            counts += np.bincount(label.reshape(-1), minlength=256)
    if reasons:
        raise _BadSamples(reasons)
    return tuple(contents), counts


def read_sample(
    planned: PlannedSample, plan: ShardPlan
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read and check a sample.

    Returns:
        (pixels, label map): uint8 [H, W, 3], or [N] for a JPEG's own bytes, and uint8 [H, W].

    Raises:
        BadFile: the image or label map cannot be packed.
    """
    sample, entry = planned.sample, planned.entry
    data = read_bytes(sample.image)
    image = decode_rgb(data, str(sample.image))  # checks an encoded image too
    label = source_module(plan.settings.source).read_label(plan.settings, sample)
    if image.shape[:2] != label.shape:
        raise BadFile(
            f"{sample.image} is {_size(image)} but its label map {sample.label} is "
            f"{_size(label)} (width x height); replace one of them"
        )
    pixels = np.frombuffer(data, np.uint8) if entry.codec == "encoded" else image
    if image.shape[:2] != (entry.height, entry.width) or pixels.size != entry.pixels_size:
        raise BadFile(f"{sample.image} changed while it was packed; run again")
    return pixels, label


def _content(planned: PlannedSample, pixels: NDArray[np.uint8]) -> str:
    digest = blake2b(pixels.data, digest_size=16)
    digest.update(f"{planned.entry.height} {planned.entry.width}".encode())
    return digest.hexdigest()


def _write_record(plan: ShardPlan, packed: PackedShard) -> None:
    record = {
        "stamp": plan.stamp,
        "summary": asdict(packed.summary) if packed.summary else None,
        "left_out": list(packed.bad),
        "contents": list(packed.contents),
    }
    write_json(plan.record_path, record)


def _size(array: NDArray[np.uint8]) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
