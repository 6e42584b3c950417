"""Write a finished run of any size without training it.

It has packed data sets, task files, a submission record, and simulated counts of every cell. The
programs' own writers write them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.pack import pack
from data_prep.shards.manifest import Manifest
from hpc.storage.atomic import write_json
from hpc.storage.fencing import claim
from jobs.metrics.counts import FIXED_POINT, NAMES, NLL_FIXED_POINT, Counts
from jobs.spec.counts_file import cell_record, write_counts
from jobs.spec.task import Task, write_task
from pipeline.config.grid_file import Grid, read_grid
from pipeline.planning.plan import make_plan
from pipeline.tracking.outcomes import granted
from pipeline.tracking.submissions import Submission

MODELS = ("fcn_resnet50", "deeplabv3_resnet50", "fcn_resnet101", "deeplabv3_resnet101")
CLASSES = {"streets": 12, "roofs": 14, "fields": 16, "rooms": 19, "cells": 21}  # by data set
_STATIC = ("CE", "WCE", "DL", "WDL", "FL", "TL", "CEMP", "DLCE", "DLWCE", "WDLWCE")
_SCHEDULED = ("DLNCE", "DLNWCE", "WDLNCE", "WDLNWCE", "DLACE", "DLAWCE", "WDLACE", "WDLAWCE")
_RAMPS = ("", "@0.1-0.5", "@0.2-0.8", "@0.4-0.6", "@0.5-1")
LOSSES = _STATIC + tuple(name + ramp for ramp in _RAMPS for name in _SCHEDULED)  # 50
_IMAGES, _SIDE = 100, 500  # of a simulated validation set: pictures, and the side of each in pixels
_GRID = """
name = "scale"
seeds = {seeds}
models = {models}
losses = {losses}
run_dir = "{folder}/run"

[protocol]
crop = [64, 64]
weights = "none"

[cluster]
kind = "local"
cells_per_job = {cells_per_job}
"""
_DATASET = """
[dataset.{name}]
source = "folder"
root = "{folder}/{name}"
shards = "{folder}/{name}/shards"
classes = {classes}
"""


def large_grid(
    folder: Path,
    seeds: int,
    datasets: Sequence[str] = tuple(CLASSES),
    losses: Sequence[str] = LOSSES,
    cells_per_job: int = 4,
) -> Grid:
    """Return a grid of `MODELS` with `seeds` seeds, after packing its data sets in `folder`."""
    text = _GRID.format(
        seeds=list(range(seeds)),
        models=json.dumps(MODELS),
        losses=json.dumps(losses),
        folder=folder,
        cells_per_job=cells_per_job,
    )
    for name in datasets:
        classes = json.dumps([f"{name} {label}" for label in range(CLASSES[name])])
        text += _DATASET.format(name=name, folder=folder, classes=classes)
        _pictures(folder / name, CLASSES[name])
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    grid = read_grid(path)
    for name, settings in grid.datasets.items():
        pack(name, settings, processes=1)
    return grid


def write_submission(grid: Grid) -> tuple[Task, ...]:
    """Write the tasks and the record of a submission of the whole grid; queue nothing."""
    tasks = make_plan(grid, grid.cells, steps={}, backbones=(), source={}).bundles
    record = Submission(grid.run)
    record.limits(granted(grid.cluster), {})
    record.plan(tasks)
    for task in tasks:
        write_task(task)
    record.submitted([task.name for task in tasks], [f"job{n}" for n in range(len(tasks))])
    return tasks


def write_finished(grid: Grid, tasks: Sequence[Task]) -> None:
    """Write the claims, last heartbeats and counts of tasks whose jobs have succeeded."""
    manifests = {n: Manifest.load(settings.shards) for n, settings in grid.datasets.items()}
    for task in tasks:
        cells, manifest = task.cells, manifests[task.cells[0].dataset]
        generation = claim(
            grid.run.generations(cells[0].bundle_key), [cell.signature for cell in cells]
        ).number
        beat = {"stage": "done", "step": 3660, "total": 3660, "steps_per_second": 1.5, "time": 0.0}
        write_json(grid.run.progress_of(task.name), {**beat, "generation": generation})
        bins = cells[0].protocol.bins
        counts = [
            simulated_counts(len(manifest.classes), bins, int(cell.signature, 16)) for cell in cells
        ]
        entries = [cell_record(cell, "ab" * 32) for cell in cells]
        record = {
            "task": task.name,
            "generation": generation,
            "manifest": manifest.fingerprint,
            "provenance": [{"torch": "2.10.0", "world_size": 4, "device": "cuda"}],
            "source": {"commit": "0123abc"},
            "time": 0.0,
        }
        arrays = {name: np.stack([one.as_arrays()[name] for one in counts]) for name in NAMES}
        write_counts(grid.run.counts_of(task.name, generation), entries, arrays, record)


def simulated_counts(num_classes: int, bins: int, seed: int) -> Counts:
    """Return simulated counts of a classifier that prefers frequent classes; equal seeds are equal.

    All sums agree with each other as those of real pixels do.
    """
    generator = np.random.default_rng(seed)
    shares = np.geomspace(1.0, 0.003, num_classes)
    pixels = _IMAGES * _SIDE**2
    labelled = generator.multinomial(pixels, shares / shares.sum())
    recall = np.clip(0.95 - 0.5 * np.linspace(0, 1, num_classes) * generator.random(), 0.02, 1)
    mistaken = np.outer(1 - recall, shares)
    np.fill_diagonal(mistaken, 0)
    likely = np.diag(recall) + mistaken * ((1 - recall) / mistaken.sum(axis=1))[:, None]
    confusion = generator.multinomial(labelled, likely / likely.sum(axis=1, keepdims=True))
    sharpness = generator.uniform(1, 4)
    rising = np.linspace(0.05, 1, bins) ** sharpness
    of_label = generator.multinomial(labelled, rising / rising.sum())
    others = generator.multinomial(pixels - labelled, rising[::-1] / rising.sum())
    right = np.trace(confusion)
    hits = generator.multinomial(right, rising / rising.sum())
    misses = generator.multinomial(pixels - right, np.full(bins, 1 / bins))
    return Counts(
        confusion=confusion,
        class_bins=_histogram(generator, of_label, others),
        top1_bins=_histogram(generator, hits, misses),
        brier=np.int64(generator.uniform(0.1, 0.9) * pixels * FIXED_POINT),
        nll=np.int64(generator.uniform(0.2, 2.0) * pixels * NLL_FIXED_POINT),
        pixels=np.int64(pixels),
        void=np.int64(pixels // 50),
        images=np.int64(_IMAGES),
    )


def _histogram(
    generator: np.random.Generator, hits: NDArray[np.int64], misses: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return bins [..., N, (count, hits, sum of scores)] whose mean scores lie in their bins."""
    bins = hits.shape[-1]
    count = hits + misses
    score = (np.arange(bins) + generator.uniform(0.2, 0.8, hits.shape)) / bins
    return np.stack([count, hits, np.int64(count * score * FIXED_POINT)], axis=-1)


def _pictures(folder: Path, num_classes: int) -> None:
    """Write 12 training and 4 validation images, with every class in each."""
    generator = np.random.default_rng(num_classes)
    for split, number in (("train", 12), ("val", 4)):
        for name in (split, f"{split}annot"):
            (folder / name).mkdir(parents=True)
        for stem in range(number):
            labels = generator.integers(0, num_classes, (48, 64), np.uint8)
            colours = generator.integers(0, 256, (48, 64, 3), np.uint8)
            Image.fromarray(colours).save(folder / split / f"{split}{stem}.png")
            Image.fromarray(labels).save(folder / f"{split}annot" / f"{split}{stem}.png")
