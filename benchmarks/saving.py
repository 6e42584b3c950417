"""Measure a checkpoint of four cells, each a head and its momentum, on this machine's disk.

Ours has a checksum, is synced to disk, and appears by one rename. The peers are

* `torch.save` of the same content, without any guarantee for readers or after a crash;
* the same with a sync;
* `torch.save` of the whole model and its optimiser's state, with a sync. The optimiser of the
  published code holds the head alone, so its state is the head's momentum. `more` holds the sizes,
  also that of a whole model with all its momentum.

Seconds are per cell. All write new files and keep as many old ones, so all fill the page cache
alike; on a virtual machine this may take longer than writing.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Comparison, Work, compare
from hpc.storage import checkpoint
from hpc.storage.atomic import fsync
from hpc.storage.fencing import Generation, claim
from jobs.models.build import build_backbone, build_head

MODELS = ("fcn_resnet101", "deeplabv3_resnet101")
CELLS = 4
_SIZES = ("head_mb", "whole_mb", "whole_and_all_momentum_mb")


def measure() -> list[Comparison]:
    """Compare sizes and seconds for both heads of the paper."""
    torch.set_num_threads(2)
    backbone = build_backbone("resnet101", 0, 0.1)
    found = []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # /tmp may be in main memory
        for model in MODELS:
            found += _of_model(model, backbone, Path(folder) / model)
    return found


def _of_model(model: str, backbone: nn.Module, folder: Path) -> list[Comparison]:
    head = build_head(model, 21, 0, 0.1)
    ours = {"network": head.state_dict(), "momentum": _momentum(head), "scaler": {}, "backbone": {}}
    entries = {f"cell-{number}": ours for number in range(CELLS)}
    whole = {
        "model": {**backbone.state_dict(), **head.state_dict()},
        "optimizer": _momentum(head),
    }
    generation = claim(folder / "generations", entries)
    sizes = _sizes(ours, whole, {**whole, "all": _momentum(backbone)}, folder / "size.pt")
    seconds = compare(
        f"checkpoint of a cell, {model}: time",
        _checkpoint(folder / "checkpoints", generation, entries),
        {
            "torch.save of the same": (_saved(ours, folder / "plain"), 1 / 1.3),
            "torch.save of the same, and a sync": (_saved(ours, folder / "synced", fsync), 0.0),
            "torch.save of the whole model and its optimiser, and a sync": (
                _saved(whole, folder / "whole", fsync), 0.0,
            ),
        },
        limit=_limit(ours, folder / "limit"),
        rounds=5,
        units=CELLS,
        more=sizes,
    )  # fmt: skip
    return [*seconds, *_of_sizes(model, sizes)]


def _of_sizes(model: str, sizes: dict[str, float | str]) -> list[Comparison]:
    """Return the sizes as comparisons, in seconds at 1 GB/s."""
    head, whole, largest = (float(sizes[name]) / 1e3 for name in _SIZES)
    what = f"checkpoint of a cell, {model}: size, as seconds at 1 GB/s"
    return [
        Comparison(what, "the whole model, the head's momentum", (head,), (whole,), more=sizes),
        Comparison(what, "the whole model, all its momentum", (head,), (largest,), 3.0, more=sizes),
    ]


def _sizes(ours: Any, whole: Any, largest: Any, path: Path) -> dict[str, float | str]:
    sizes: dict[str, float | str] = {}
    for name, content in zip(_SIZES, (ours, whole, largest), strict=True):
        torch.save(content, path)
        sizes[name] = round(path.stat().st_size / 1e6, 1)
    path.unlink()
    return sizes


def _momentum(module: nn.Module) -> dict[int, dict[str, torch.Tensor]]:
    return {i: {"momentum_buffer": p.detach().clone()} for i, p in enumerate(module.parameters())}


def _checkpoint(folder: Path, generation: Generation, entries: dict[str, Any]) -> Work:
    steps = iter(range(1, 10**9))

    def save() -> None:  # as in a job, the two newest are kept
        checkpoint.save(folder, next(steps), generation, entries, {"inputs": {}})

    return save


def _saved(content: Any, folder: Path, synced: Callable[[Path], None] | None = None) -> Work:
    """Return a function that writes `content` for each cell to a new folder, and keeps as many."""
    steps = iter(range(1, 10**9))

    def save() -> None:
        step = next(steps)
        new = folder / str(step)
        new.mkdir(parents=True)
        for number in range(CELLS):
            path = new / f"{number}.pt"
            torch.save(content, path)
            if synced:
                synced(path)
        shutil.rmtree(folder / str(step - checkpoint.KEPT), ignore_errors=True)

    return save


def _limit(state: dict[str, Any], path: Path) -> str:
    """Return the time to write and sync as many bytes in one piece."""
    torch.save(state, path)
    data = path.read_bytes()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        path.write_bytes(data)
        fsync(path)
        seconds.append(time.perf_counter() - start)
    path.unlink()
    return f"{len(data) / 1e6:.0f} MB written and synced: {min(seconds) * 1e3:.0f} ms"
