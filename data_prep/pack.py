"""Pack the data sets of a grid file into shards: `python -m data_prep.pack CONFIG`.

It uses all cores, or the ranks of `mpiexec`. It may be killed at any point and run again: good
shards stay. The manifest, without which nothing is read, is written last. A shard of other content
has another name, so jobs that read earlier shards are not disturbed.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from data_prep.packing.pack_shard import PackedShard, already_packed, pack_shard
from data_prep.packing.shard_plan import (
    PackingPlan,
    ShardPlan,
    SourceFiles,
    check_room,
    find_source,
    plan_shards,
)
from data_prep.packing.split_overlap import ImageIds, overlap_warnings
from data_prep.packing.worker_pool import in_processes, sensible_processes, with_progress
from data_prep.settings import DatasetSettings, read_datasets
from data_prep.shards.manifest import MANIFEST, ROOTS, SPLITS, Manifest, SplitSummary, shard_stem
from hpc.cli import UserError, argument_parser, one_line, run
from hpc.config import did_you_mean
from hpc.distributed.mpi import World, world
from hpc.storage.atomic import TEMPORARY_PREFIX

_OUR_FILES = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}(-[0-9a-f]{{12}})?\.(h5|json)")
_DEAD_AFTER = 3600.0  # seconds since anything was written to a temporary file
_KEPT_DAYS = 30  # how long shards of earlier content stay: longer than a job that may open them


def main(argv: Sequence[str]) -> int:
    """Run the command, and return its exit code."""
    parser = argument_parser("python -m data_prep.pack", __doc__)
    parser.add_argument("config", help="grid file with [dataset.NAME] tables")
    parser.add_argument("--dataset", metavar="NAME", help="only this data set")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad files out and list them")
    parser.add_argument("--processes", type=int, metavar="N", help="default: all usable cores")
    options = parser.parse_args(argv)
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes must be at least 1, not {options.processes}")
    ranks = world()
    with ranks.abort_on_error():
        datasets = _chosen(options.config, options.dataset)
        image_ids = {}
        for name, settings in datasets.items():
            manifest = pack(
                name, settings, skip_bad=options.skip_bad, processes=options.processes, ranks=ranks
            )
            image_ids[name] = ImageIds.packed(manifest)
            if ranks.rank == 0:
                print(_report(manifest), flush=True)
                for warning in manifest.warnings():
                    print(f"warning: {one_line(warning)}", file=sys.stderr, flush=True)
        for warning in overlap_warnings(datasets, image_ids) if ranks.rank == 0 else ():
            print(f"warning: {one_line(warning)}", file=sys.stderr, flush=True)
    return 0


def pack(
    name: str,
    settings: DatasetSettings,
    *,
    skip_bad: bool = False,
    processes: int | None = None,
    ranks: World | None = None,
) -> Manifest:
    """Pack both splits of one data set into `settings.shards`. All ranks must call it.

    Shards of an unchanged source are kept; if all are, this is quick.

    Args:
        name: the data set's name.
        settings: its settings.
        skip_bad: leave bad files out instead of refusing them; also if `settings.skip_bad`.
        processes: number of processes; default all usable cores, if there is enough work. Ignored
            with more than one rank.
        ranks: the MPI ranks that share the work; default one.

    Returns:
        The manifest, on every rank.

    Raises:
        UserError: the source has an error, or the folder holds a data set of other settings. Data
            that were packed before are unchanged.
    """
    ranks = ranks or World()
    skip_bad = skip_bad or settings.skip_bad
    source = _checked_source(name, settings) if ranks.rank == 0 else None
    finished = ranks.bcast(_finished(name, source) if source else None)
    if finished:
        return finished
    plan = ranks.bcast(plan_shards(source) if source else None)
    assert plan is not None
    packed = _pack_missing(name, plan, skip_bad, processes, ranks)
    manifest = _write_manifest(name, source, plan, packed, skip_bad) if source else None
    manifest = ranks.bcast(manifest)
    assert manifest is not None
    return manifest


def _chosen(config: str, only: str | None) -> dict[str, DatasetSettings]:
    datasets = read_datasets(config)
    if only is None:
        return datasets
    if only not in datasets:
        raise UserError(f"{config}: no data set {only!r}; {did_you_mean(only, datasets)}")
    return {only: datasets[only]}


def _checked_source(name: str, settings: DatasetSettings) -> SourceFiles:
    """Return the source's files.

    Raises:
        UserError: the folder for the shards holds a data set of other settings. Settings that
            only locate the same files may differ.
    """
    existing, origin = _existing_manifest(settings), settings.origin()
    different = existing.differences(origin) if existing else {}
    # before `find_source`, which draws synthetic images
    if existing and different.keys() - ROOTS:
        existing.require_settings(origin, settings.shards, name)
    source = find_source(settings)
    if existing and existing.source_stamp != source.stamp:
        existing.require_settings(origin, settings.shards, name)
    return source


def _existing_manifest(settings: DatasetSettings) -> Manifest | None:
    """Return the manifest in the folder for the shards; None if there is no readable one."""
    try:
        return Manifest.load(settings.shards)
    except UserError:
        return None


def _finished(name: str, source: SourceFiles) -> Manifest | None:
    """Return the manifest of an earlier run, if it describes the source as it is now."""
    folder = Path(source.settings.shards)
    try:
        manifest = Manifest.load(folder)
        manifest.check_files()
    except UserError:
        return None
    if (manifest.name, manifest.source_stamp) != (name, source.stamp):
        return None
    if manifest.origin != source.settings.origin():  # the source moved
        manifest = replace(manifest, origin=source.settings.origin())
        with suppress(UserError):  # the packed data may be on a read-only disk
            manifest.save()
    manifest.require_classes(source.settings)
    _remove_stale(manifest)
    return manifest


def _pack_missing(
    name: str, plan: PackingPlan, skip_bad: bool, processes: int | None, ranks: World
) -> list[PackedShard]:
    """Pack the missing shards; return the results of all shards on rank 0."""
    kept, todo = ranks.bcast(_kept_and_todo(plan, skip_bad) if ranks.rank == 0 else ([], []))
    mine = todo[ranks.rank :: ranks.size]
    workers = _workers(processes, mine) if ranks.size == 1 else 1
    work = in_processes(partial(pack_shard, skip_bad=skip_bad), mine, workers)
    done = list(with_progress(work, len(mine), f"{name}: shards") if ranks.rank == 0 else work)
    gathered = ranks.gather(done) or []
    return sorted([*kept, *chain.from_iterable(gathered)], key=lambda p: (p.split, p.number))


def _workers(asked: int | None, todo: Sequence[ShardPlan]) -> int:
    return asked or sensible_processes(sum(shard.bytes for shard in todo))


def _kept_and_todo(plan: PackingPlan, skip_bad: bool) -> tuple[list[PackedShard], list[ShardPlan]]:
    kept, todo = list[PackedShard](), list[ShardPlan]()
    for shard in plan.shards:
        packed = already_packed(shard, skip_bad)
        if packed:
            kept.append(packed)
        else:
            todo.append(shard)
    if plan.shards:
        check_room(plan.shards[0].folder, sum(shard.bytes for shard in todo))
    return kept, todo


def _write_manifest(
    name: str, source: SourceFiles, plan: PackingPlan, packed: list[PackedShard], skip_bad: bool
) -> Manifest:
    splits = {}
    for split in SPLITS:
        of_split = [p for p in packed if p.split == split]
        bad = (*plan.bad[split], *(message for p in of_split for message in p.bad))
        if bad and not skip_bad:
            _refuse(name, bad)
        shards = tuple(p.summary for p in of_split if p.summary)
        if not shards:
            raise UserError(f"{name}: no sample of {split} is left; {bad[0]}")
        splits[split] = SplitSummary(shards, bad)
    settings = source.settings
    manifest = Manifest(
        Path(settings.shards), name, source.classes, splits, source.stamp,
        leaked=_leaked(packed), origin=settings.origin(),
    )  # fmt: skip
    manifest.require_classes(settings)
    earlier = _existing_manifest(settings)
    if earlier and earlier.source_stamp != source.stamp:
        # another grid may have packed into this folder meanwhile
        earlier.require_settings(settings.origin(), settings.shards, name)
    if earlier:
        old_files = earlier.files.union(earlier.kept if _is_recent(earlier) else ())
        manifest = replace(manifest, kept=tuple(sorted(old_files - manifest.files)))
    manifest.save()
    _remove_stale(manifest)
    return manifest


def _leaked(packed: Sequence[PackedShard]) -> tuple[str, ...]:
    """Return the ids of validation images whose content is also a training image's."""
    trained = {content for p in packed if p.split == "train" for content in p.contents}
    validated = ((p.summary.ids, p.contents) for p in packed if p.split == "val" and p.summary)
    pairs = chain.from_iterable(zip(*both, strict=True) for both in validated)
    return tuple(one for one, content in pairs if content in trained)


def _refuse(name: str, bad: Sequence[str]) -> None:
    others = f" (and {len(bad) - 1} more bad files)" if len(bad) > 1 else ""
    raise UserError(
        f"{bad[0]}{others}; --skip-bad, or skip_bad = true in [dataset.{name}], packs the rest"
    )


def _remove_stale(manifest: Manifest) -> None:
    """Remove shards that the manifest does not name, and temporary files of killed writers.

    Shards of earlier content stay for `_KEPT_DAYS`: running jobs open them when first needed.
    """
    needed = manifest.files.union(manifest.kept if _is_recent(manifest) else ())
    needed |= {f"{shard_stem(shard)}.json" for shard in manifest.files}
    for file in manifest.folder.iterdir():
        stale = _OUR_FILES.fullmatch(file.name) and file.name not in needed
        if stale or (file.name.startswith(TEMPORARY_PREFIX) and _is_dead(file)):
            with suppress(OSError):  # the packed data may be on a read-only disk
                file.unlink()


def _is_recent(manifest: Manifest) -> bool:
    """Return whether jobs that began before this manifest was written may still run."""
    age = time.time() - (manifest.folder / MANIFEST).stat().st_mtime
    return age < _KEPT_DAYS * 86400


def _is_dead(temporary: Path) -> bool:
    try:
        return time.time() - temporary.stat().st_mtime > _DEAD_AFTER
    except FileNotFoundError:  # its writer renamed it meanwhile
        return False


def _report(manifest: Manifest) -> str:
    lines, folder = [], one_line(str(manifest.folder))
    for split, summary in manifest.splits.items():
        size = sum(shard.bytes for shard in summary.shards)
        shards = f"{len(summary.shards)} shards, {size / 1e6:.1f} MB"
        what = f"{summary.images} images, {shards}, {summary.void_share} void"
        lines.append(f"{one_line(manifest.name)} {split}: {what}, in {folder}")
        lines += [f"  left out: {one_line(message)}" for message in summary.left_out]
    if earlier := [p for file in manifest.kept if (p := manifest.folder / file).exists()]:
        size = sum(path.stat().st_size for path in earlier)
        kept = f"{size / 1e6:.1f} MB, kept {_KEPT_DAYS} days for running jobs"
        lines.append(f"  earlier shards: {kept}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
