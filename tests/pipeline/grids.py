"""Grid files for the tests of planning: small, whole, and changed as one asks; and the counts that
finished jobs leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.shards.manifest import Manifest
from jobs.metrics.counts import NAMES, Counts
from jobs.spec.cell import Cell
from jobs.spec.counts_file import write_counts
from pipeline.config.grid_file import Grid, read_grid

TEXT = """\
name = "small"
seeds = [0, 1]
models = ["fcn_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"]
losses = ["CE", "DLNWCE"]
run_dir = "{folder}/run"

[dataset.streets]
source = "synthetic"
shards = "{folder}/streets"
train = 6
val = 3
size = [32, 40]

[protocol]
epochs = 2
batch_size = 2
resize = [32, 40]
crop = [32, 32]
eval_size = 0
weights = "none"
threads = 1

[cluster]
kind = "local"
"""


def grid_file(folder: Path, *changes: tuple[str, str], more: str = "", top: str = "") -> Path:
    """A grid file in `folder` with `changes` (old text, new text), each of which must apply once;
    `top` comes first, `more` last."""
    text = TEXT.format(folder=folder)
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is in the text {text.count(old)} times"
        text = text.replace(old, new)
    path = folder / "grid.toml"
    path.write_text(top + text + more, encoding="utf-8")
    return path


def small_grid(folder: Path, *changes: tuple[str, str], more: str = "", top: str = "") -> Grid:
    """Write and read a small grid file."""
    return read_grid(grid_file(folder, *changes, more=more, top=top))


def counts_of(cell: Cell, manifest: Manifest) -> Counts:
    """Made-up counts, another for each cell, the same for the same cell; beyond what a float64
    holds, so that any detour over floats is seen."""
    generator = np.random.default_rng(int(cell.signature, 16))
    zeros = Counts.zeros(len(manifest.classes), cell.protocol.bins).as_arrays()
    return Counts.from_arrays(
        {name: generator.integers(0, 2**62, array.shape) for name, array in zeros.items()}
    )


def finish(grid: Grid, cells: Sequence[Cell], task: str, generation: int = 1, **record) -> Path:
    """Leave what a job leaves that has trained `cells`: their counts. Returns the file's path."""
    manifest = Manifest.load(grid.datasets[cells[0].dataset].shards)
    counts = [counts_of(cell, manifest).as_arrays() for cell in cells]
    arrays = {name: np.stack([one[name] for one in counts]) for name in NAMES}
    entries = [
        {"signature": cell.signature, "name": cell.name, "backbone": "0123"} for cell in cells
    ]
    about = {"manifest": manifest.fingerprint, "provenance": [{"torch": "2"}], "source": {}}
    path = grid.run.counts_of(task, generation)
    write_counts(path, entries, arrays, {**about, **record})
    return path


def pairs(folder: Path, stems: str, size=(32, 40)) -> None:
    """Images and label maps of the stems, in `train` and `val` and their `annot`; the label maps
    hold two classes."""
    for split in ("train", "val"):
        for name, shape in ((split, (*size, 3)), (f"{split}annot", size)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            pixels = np.zeros(shape, np.uint8)
            pixels[0] = 1
            for stem in stems:
                Image.fromarray(pixels).save(folder / name / f"{stem}.png")
