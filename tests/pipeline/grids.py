"""Grid files for the tests of planning: small, whole, and changed as one asks."""

from __future__ import annotations

from pathlib import Path

from pipeline.grid import Grid, read_grid

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
    """That file, read."""
    return read_grid(grid_file(folder, *changes, more=more, top=top))
