"""Share small grids and packed data among the tests of the pipeline."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.pack import pack
from hpc.cli import run
from pipeline import doctor
from tests.pipeline.doctor.fake_site import FakeSite, profile_file
from tests.pipeline.grids import grid_file, small_grid


@pytest.fixture(scope="session")
def streets(tmp_path_factory) -> Path:
    """The packed data set of the small grid."""
    folder = tmp_path_factory.mktemp("streets")
    pack("streets", small_grid(folder).datasets["streets"], processes=1)
    return folder / "streets"


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch) -> None:
    """Plans are for a cluster's disk: how full the disk of this machine is changes none of them."""
    honest = os.statvfs

    def told(path: str | Path) -> SimpleNamespace:
        found = honest(path)
        numbers = {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}
        return SimpleNamespace(**numbers | {"f_bavail": 10**15 // found.f_frsize})

    monkeypatch.setattr(os, "statvfs", told)


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Return the refusal of a command without `error: `; nothing was queued."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    monkeypatch.delenv("LOSSGRID_CONFIG", raising=False)

    def refused(main, *arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(main, [str(argument) for argument in arguments])
        line = capsys.readouterr().err
        assert ended.value.code == 2
        assert line.startswith("error: ")
        assert line.endswith("\n") and line.count("\n") == 1
        for folder in ("queue", "submitted", "tasks", "logs"):
            assert not list(tmp_path.glob(f"**/{folder}"))
        return line.removeprefix("error: ").rstrip("\n")

    return refused


@pytest.fixture
def site(tmp_path, monkeypatch) -> FakeSite:
    """A Slurm cluster on paper, which the commands on PATH tell of."""
    fake = FakeSite(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(fake.folder / "bin"), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return fake


@pytest.fixture
def shards(tmp_path, streets) -> Path:
    """A copy of the packed data set, to be damaged."""
    return shutil.copytree(streets, tmp_path / "streets")


@pytest.fixture
def examine(tmp_path, site, shards, capsys):
    """The doctor's lines about a grid on that site; and its exit code."""

    def lines(*changes, arguments=(), **profile) -> tuple[int, list[str]]:
        config = grid_file(tmp_path, *changes)
        cluster = profile_file(tmp_path, **profile)
        code = doctor.main([str(config), "--cluster", str(cluster), *arguments])
        return code, capsys.readouterr().out.splitlines()

    return lines
