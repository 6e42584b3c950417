"""Small data sets in folders, as a user would have them, for the tests of packing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.settings import DatasetSettings, parse_dataset
from hpc.cli import run

REPOSITORY = Path(__file__).parents[2]
CLASSES = ("wall", "floor", "door")


@dataclass
class Folder:
    """A data set under `root`, its settings and its shards."""

    root: Path
    table: dict[str, object] = field(default_factory=dict)

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    def shard(self, stem: str) -> Path:
        """Return the file of a packed shard, whose name ends with a hash of its content."""
        [path] = self.shards.glob(f"{stem}-*.h5")
        return path

    @property
    def settings(self) -> DatasetSettings:
        defaults = {"source": "folder", "root": str(self.root), "shards": str(self.shards)}
        table = {**defaults, "classes": list(CLASSES), "void": 11, **self.table}
        return parse_dataset("rooms", table, "grid.toml")

    def image(self, name: str, size=(20, 30), mode="RGB", split="train", **save) -> Path:
        """Write a noisy image of `size` (h, w) in `mode`."""
        path = self.root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(len(name)).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).convert(mode).save(path, **save)
        return path

    def label(self, name: str, size=(20, 30), split="train", values=(0, 1, 2, 11)) -> Path:
        """Write a label map of `size` with the given values."""
        path = self.root / f"{split}annot" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picks = np.random.default_rng(7).choice(np.array(values, np.uint8), size)
        Image.fromarray(picks).save(path)
        return path

    def pair(self, stem: str, size=(20, 30), split="train", suffix=".png") -> None:
        self.image(f"{stem}{suffix}", size, split=split)
        self.label(f"{stem}.png", size, split=split)

    def config(self) -> Path:
        """Write a grid file with this data set as [dataset.rooms]."""
        lines = ["[dataset.rooms]"]
        for key, value in self.settings.model_dump().items():
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
        path = self.root / "grid.toml"
        path.write_text("\n".join(lines))
        return path


@pytest.fixture
def rooms(tmp_path: Path) -> Folder:
    """Three training images, of three sizes, JPEG and PNG, and one validation image."""
    folder = Folder(tmp_path)
    folder.pair("b", (70, 30))
    folder.pair("a", (20, 31), suffix=".jpg")
    folder.pair("Ä", (130, 9))
    folder.pair("v", split="val")
    return folder


@pytest.fixture(scope="session")
def _large_rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Folder(tmp_path_factory.mktemp("large"))
    for number in range(11):
        folder.pair(f"room{number}", (520, 500))
    folder.pair("v", (520, 500), split="val")
    return folder.root


@pytest.fixture
def many_rooms(tmp_path: Path, _large_rooms: Path) -> Folder:
    """Twelve large images, each in a shard of its own."""
    shutil.copytree(_large_rooms, tmp_path, dirs_exist_ok=True)
    return Folder(tmp_path, {"shard_mb": 1})


@pytest.fixture
def command():
    """Run `python -m MODULE ARGUMENTS` as a user does."""

    def start(module: str, *arguments: object, launcher: tuple[str, ...] = (), **options):
        line = [*launcher, sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(
            line, cwd=REPOSITORY, text=True, capture_output=True, timeout=60, **options
        )

    return start


@pytest.fixture
def command_line(capsys):
    """Run it in this process, which is faster: exit code, standard output, standard error."""

    def call(module: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(import_module(module).main, [str(argument) for argument in arguments])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


@pytest.fixture
def mpiexec() -> str:
    """The launcher of the MPI beside this Python; skips the test if there is none."""
    path = Path(sys.executable).parent / "mpiexec"
    if not os.access(path, os.X_OK):
        pytest.skip("no mpiexec beside this Python")
    return str(path)
