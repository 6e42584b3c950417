"""Refuse a submission before anything is queued: wrong data sets or weights, no room on disk."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.packing.split_overlap import ImageIds, overlap_warnings
from data_prep.settings import DatasetSettings
from data_prep.shards.manifest import Manifest
from data_prep.weights import WITHOUT_FILE, require_weights
from hpc.cli import MissingInput, UserError, one_line
from hpc.diagnostics.check import shown_bytes
from jobs.spec.cell import Cell, bundles
from pipeline.config.grid_file import Grid
from pipeline.planning.cost_model import bytes_of, files_of


def check_sources(grid: Grid) -> list[MissingInput]:
    """Return a `MissingInput` for each data set whose files are not there. Raises `UserError` if
    those that are do not pair."""
    missing: list[MissingInput] = []
    for settings in grid.datasets.values():
        with _collected(missing):
            ImageIds.of_source(settings)
    return missing


@contextmanager
def _collected(missing: list[MissingInput]) -> Iterator[None]:
    try:
        yield
    except MissingInput as error:
        missing.append(error)


def check_inputs(grid: Grid, packed: bool, quiet: bool = False) -> list[MissingInput]:
    """Check the data sets and weights of a grid; print warnings if nothing is refused or missing.

    Args:
        packed: Check the packed data sets. False: packing comes first, so check the sources.
        quiet: Print no warnings.

    Returns:
        A `MissingInput` for each data set and weights file that is not there.

    Raises:
        UserError: A batch is larger than a training set, or a data set is wrong.
    """
    missing: list[MissingInput] = []
    warnings: list[str] = []
    image_ids = {}
    for name, settings in grid.datasets.items():
        if packed:
            manifest = require_packed(name, settings)
            image_ids[name] = ImageIds.packed(manifest)
            warnings += [*manifest.warnings(), *_left_out(manifest)]
        else:
            with _collected(missing):
                image_ids[name] = ImageIds.of_source(settings)
        if name not in image_ids:
            continue
        images = len(image_ids[name].train)
        protocol = grid.protocols[name]
        protocol.steps_per_epoch(images)
        if protocol.weights == "pretrain" and images < protocol.pretrain.batch_size:
            raise UserError(
                f"[protocol.pretrain] batch_size = {protocol.pretrain.batch_size} is larger than "
                f"the training set of {images} images; choose a smaller one"
            )
    needed = dict.fromkeys((cell.protocol.weights, cell.model) for cell in grid.cells)
    for weights, model in needed:
        if weights not in WITHOUT_FILE:
            with _collected(missing):
                require_weights(weights, model)
    if missing or quiet:
        return missing
    for warning in [*warnings, *overlap_warnings(grid.datasets, image_ids)]:
        print(f"warning: {one_line(warning)}", file=sys.stderr)
    return missing


def _left_out(manifest: Manifest) -> list[str]:
    return [
        f"{len(summary.left_out)} of {split} of the data set {manifest.name!r} were left out when "
        f"it was packed; the first is {summary.left_out[0]}"
        for split, summary in manifest.splits.items()
        if summary.left_out
    ]


def require_packed(name: str, settings: DatasetSettings) -> Manifest:
    """Return the manifest of the packed data set of [dataset.`name`]. Raises `UserError` if it is
    not there, a shard is missing or of another length, or it was packed with other settings."""
    manifest = Manifest.load(settings.shards)
    manifest.require_settings(
        settings.origin(), settings.shards, name,
        "; if the same files moved, run `python -m pipeline.submit prep` first",
    )  # fmt: skip
    manifest.check_files()
    manifest.require_classes(settings)
    return manifest


def check_room(grid: Grid, cells: Iterable[Cell]) -> str:
    """Return a line about the room on the disk of the run directory.

    Raises:
        UserError: The disk has no room for the heads and checkpoints.
    """
    needed = sum(bytes_of(cell) for cell in cells)
    existing = existing_folder(grid)
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{grid.run.root} needs {shown_bytes(needed)} for heads and checkpoints, but "
            f"{existing} has {shown_bytes(free)} free; make room or set run_dir to another disk"
        )
    return f"{shown_bytes(needed)} at most, {shown_bytes(free)} are free"


def check_files(grid: Grid, cells: Iterable[Cell]) -> str:
    """Do as `check_room` for the number of files, if the disk has a limit on it."""
    needed = sum(map(files_of, bundles(cells).values()))
    disk = os.statvfs(existing_folder(grid))
    if not disk.f_files:
        return f"{needed:,} at most, the disk sets no limit"
    if needed > disk.f_favail:
        raise UserError(
            f"{grid.run.root} needs {needed:,} files, but its disk takes {disk.f_favail:,} more; "
            "remove some or set run_dir to another disk"
        )
    return f"{needed:,} at most, {disk.f_favail:,} are free"


def existing_folder(grid: Grid) -> Path:
    """Return the run directory, or the nearest folder above it that exists."""
    return next(p for p in (grid.run.root, *grid.run.root.parents) if p.exists())
