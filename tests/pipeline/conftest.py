"""What the tests of planning share."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.pack import pack
from hpc.command import run
from tests.pipeline.grids import small_grid


@pytest.fixture(scope="session")
def streets(tmp_path_factory) -> Path:
    """The packed data set of the small grid."""
    folder = tmp_path_factory.mktemp("streets")
    pack("streets", small_grid(folder).datasets["streets"], processes=1)
    return folder / "streets"


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """What a command says to its refused arguments, without `error: `; nothing was queued."""
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
