"""Check every byte of a packed data set: `python -m data_prep.verify DIR`.

It checks the manifest, each shard's SHA-256, every CRC, every label value and all counts. Each
damage is listed in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.packing.worker_pool import in_processes, sensible_processes, with_progress
from data_prep.settings import VOID
from data_prep.shards.manifest import Manifest, ShardSummary, check_length, remedy
from data_prep.shards.reader import ShardFile
from hpc.cli import UserError, argument_parser, one_line, run
from hpc.storage.atomic import Damaged, file_sha256


def main(argv: Sequence[str]) -> int:
    """Run the command, and return its exit code."""
    parser = argument_parser("python -m data_prep.verify", __doc__)
    parser.add_argument("folder", help="folder of a packed data set")
    options = parser.parse_args(argv)
    manifest = Manifest.load(options.folder)
    damaged = verify(manifest)
    for problem in damaged:
        print(f"damaged: {one_line(problem)}", flush=True)
    if damaged:
        more = f" (and {len(damaged) - 1} more, listed above)" if len(damaged) > 1 else ""
        raise UserError(f"{damaged[0]}{more}")
    images = ", ".join(f"{summary.images} {split}" for split, summary in manifest.splits.items())
    print(f"{manifest.folder}: {images} images, all as they were packed")
    return 0


def verify(manifest: Manifest, processes: int | None = None) -> list[str]:
    """Check all shards of a data set.

    Args:
        manifest: the data set.
        processes: number of processes; default all usable cores, if there is enough work.

    Returns:
        One message for each damage, in the manifest's order.
    """
    checks = [
        _Check(manifest.folder, shard, len(manifest.classes))
        for summary in manifest.splits.values()
        for shard in summary.shards
    ]
    found = in_processes(_problems, checks, processes or _default_processes(checks))
    by_file = dict(with_progress(found, len(checks), f"{manifest.name}: shards verified"))
    return [problem for check in checks for problem in by_file[check.summary.file]]


def _default_processes(checks: Sequence[_Check]) -> int:
    return sensible_processes(sum(check.summary.bytes for check in checks))


@dataclass(frozen=True)
class _Check:
    folder: Path
    summary: ShardSummary
    num_classes: int


def _problems(check: _Check) -> tuple[str, list[str]]:
    path = check.folder / check.summary.file
    try:
        check_length(path, check.summary.bytes)
        shard = ShardFile(path, check.summary)
    except Damaged as error:
        return check.summary.file, [str(error)]
    problems, counts = _sample_problems(shard, path, check)
    if not problems:
        problems = _summary_problems(shard, path, check, counts)
    return check.summary.file, problems


def _sample_problems(
    shard: ShardFile, path: Path, check: _Check
) -> tuple[list[str], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    problems: list[str] = []
    counts = np.zeros(256, np.int64)
    for k, entry in enumerate(shard.entries):
        try:
            shard.image(k)
            found = np.bincount(shard.label(k).reshape(-1), minlength=256)
        except Damaged as error:
            problems.append(str(error))
            continue
        counts += found
        invalid = [v for v in np.flatnonzero(found) if check.num_classes <= v != VOID]
        if invalid:
            problems.append(
                f"{path}: label map {entry.id!r} holds {invalid[0]}, which is neither one of "
                f"{check.num_classes} classes nor void; {remedy(path)}"
            )
    return problems, counts


def _summary_problems(
    shard: ShardFile,
    path: Path,
    check: _Check,
    counts: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> list[str]:
    summary = check.summary
    entries = shard.entries
    facts = {
        "ids": tuple(e.id for e in entries) == summary.ids,
        "sizes": tuple((e.height, e.width) for e in entries) == summary.sizes,
        "class pixels": tuple(counts[: check.num_classes].tolist()) == summary.class_pixels,
        "void pixels": int(counts[VOID]) == summary.void_pixels,
        "SHA-256": file_sha256(path) == summary.sha256,
    }
    return [
        f"{path}: {fact} of shard and manifest differ; {remedy(path)}"
        for fact, holds in facts.items()
        if not holds
    ]


if __name__ == "__main__":
    run(main)
