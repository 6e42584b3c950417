"""What is refused before anything is queued: data sets, weights and room on disk."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from data_prep.manifest import SPLITS, Manifest
from data_prep.overlap import ids_of, overlap_warnings
from data_prep.settings import DatasetSettings
from data_prep.sources import SOURCES
from data_prep.weights import WITHOUT_FILE, require_weights
from hpc.command import UserError, one_line
from jobs.cell import Cell
from pipeline.estimate import bytes_of
from pipeline.grid import Grid


def check_sources(grid: Grid) -> None:
    """Raise `UserError` if files that are to be packed are missing or do not pair."""
    for settings in grid.datasets.values():
        _source_ids(settings)


def check_inputs(grid: Grid, packed: bool) -> None:
    """Raise `UserError` if a data set or a weights file that the grid needs is not there, or a
    batch does not fit a training set. `packed` False: packing comes first, so look at the
    source. Where nothing is refused, standard error gets the warnings about what is packed."""
    warnings: list[str] = []
    ids = {}
    for name, settings in grid.datasets.items():
        if packed:
            manifest = _packed(settings)
            ids[name] = ids_of(manifest)
            warnings += [*manifest.warnings(), *_left_out(manifest)]
        else:
            ids[name] = _source_ids(settings)
        images = len(ids[name]["train"])
        protocol = grid.protocols[name]
        protocol.steps_per_epoch(images)
        if protocol.weights == "pretrain" and images < protocol.pretrain.batch_size:
            raise UserError(
                f"[protocol.pretrain] batch_size = {protocol.pretrain.batch_size} is larger than "
                f"the training set of {images} images; choose a smaller one"
            )
    for cell in grid.cells:
        if cell.protocol.weights not in WITHOUT_FILE:
            require_weights(cell.protocol.weights, cell.model)
    for warning in [*warnings, *overlap_warnings(grid.datasets, ids)]:
        print(f"warning: {one_line(warning)}", file=sys.stderr)


def _left_out(manifest: Manifest) -> list[str]:
    return [
        f"{len(half.left_out)} of {split} of the data set {manifest.name!r} were left out when it "
        f"was packed; the first is {half.left_out[0]}"
        for split, half in manifest.splits.items()
        if half.left_out
    ]


def _packed(settings: DatasetSettings) -> Manifest:
    manifest = Manifest.load(settings.shards)
    manifest.check_files()
    if manifest.identity != settings.identity():
        raise UserError(
            f"{settings.shards} was packed with other settings than [dataset.{manifest.name}] has "
            "now; run `python -m pipeline.submit prep` first"
        )
    manifest.require_labels()
    return manifest


def _source_ids(settings: DatasetSettings) -> dict[str, list[str]]:
    source = SOURCES[settings.source]
    # lists folders, and refuses what does not pair
    return {split: [s.id for s in source.samples(settings, split)] for split in SPLITS}


def check_room(grid: Grid, cells: Iterable[Cell]) -> None:
    """Raise `UserError` if the run directory's disk cannot hold heads and checkpoints."""
    needed = sum(bytes_of(cell) for cell in cells)
    existing = next(p for p in (grid.run.root, *grid.run.root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{grid.run.root} needs {_shown(needed)} for heads and checkpoints, but "
            f"{Path(existing)} has {_shown(free)} free; make room or set run_dir to another disk"
        )


def _shown(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
