"""A run directory that others may write to is refused before anything is queued, since submitit
unpickles from it; one that is refused is left as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.cli import UserError
from pipeline import submit
from pipeline.config.grid_file import read_grid
from pipeline.submission import submitter
from tests.pipeline.grids import grid_file, small_grid

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
REPOSITORY = Path(__file__).parents[3]
EVE = 4242


def open_to_all(run: Path) -> None:
    run.mkdir()
    run.chmod(0o777)


def open_to_its_group(run: Path) -> None:
    run.mkdir()
    os.chown(run, 0, 4343)
    run.chmod(0o775)


def of_somebody_else(run: Path) -> None:
    run.mkdir()
    os.chown(run, EVE, EVE)


def in_a_folder_open_to_all(run: Path) -> None:
    run.parent.chmod(0o777)


def linked_to_an_open_folder(run: Path) -> None:
    open_to_all(run.with_name("target"))
    run.symlink_to("target")


CASES = {
    open_to_all: "{run} can be written to by everybody, who could change what your jobs run; "
    "set run_dir to a folder of yours, or make sure that all in it is yours and run "
    "`chmod go-w {run}`",
    open_to_its_group: "{run} can be written to by the group 4343, who could change what your "
    "jobs run; set run_dir to a folder of yours, or set group = '4343' in [cluster], or make sure ",
    of_somebody_else: "{run} belongs to 4242, who could change what your jobs run; set run_dir "
    "to a folder of yours, or make it yours: `chown -hR root {run}`",
    in_a_folder_open_to_all: "{run.parent} can be written to by everybody, who could change ",
    linked_to_an_open_folder: "{run.parent}/target can be written to by everybody, who could "
    "change ",
}


def content(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dry_run", [False, True], ids=["submitted", "dry run"])
def test_a_run_directory_that_others_may_write_to_is_refused(tmp_path, case, dry_run):
    path = grid_file(tmp_path)
    case(tmp_path / "run")
    before = content(tmp_path)
    with pytest.raises(UserError) as refused:
        submit.main(["grid", str(path), *(["--dry-run"] if dry_run else [])])
    assert str(refused.value).startswith(CASES[case].format(run=tmp_path / "run"))
    assert content(tmp_path) == before


@pytest.mark.parametrize("case", [open_to_all, of_somebody_else])
def test_on_the_command_line_that_is_one_line_and_exit_code_2(tmp_path, case):
    path = grid_file(tmp_path)
    case(tmp_path / "run")
    line = [sys.executable, "-m", "pipeline.submit", "grid", str(path)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: {CASES[case].format(run=tmp_path / 'run')}\n"
    assert content(tmp_path / "run") == []


def test_a_group_that_one_is_not_in_is_refused(tmp_path):
    path = grid_file(tmp_path, ('kind = "local"', 'kind = "local"\ngroup = "nogroup"'))
    with pytest.raises(UserError, match=r"\[cluster\]: group = 'nogroup' is a group you are not"):
        submit.main(["grid", str(path)])
    assert content(tmp_path) == [path]


def test_a_refused_submission_leaves_no_run_directory(tmp_path):
    path = grid_file(tmp_path, ("batch_size = 2", "batch_size = 9999"))
    with pytest.raises(UserError, match="batch_size = 9999"):
        submit.main(["all", str(path)])
    assert content(tmp_path) == [path]


def test_a_new_run_is_private_and_an_own_readable_one_stays_readable(tmp_path):
    grid = small_grid(tmp_path)
    before = os.umask(0)
    try:
        with submitter.one_at_a_time(grid.run.root):
            assert grid.run.root.stat().st_mode & 0o777 == 0o700
        grid.run.root.chmod(0o755)
        with submitter.one_at_a_time(grid.run.root):
            assert grid.run.root.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


def test_with_a_group_the_run_is_shared_with_it(tmp_path):
    """Root is in the group root; its members can write, and what they write stays the group's."""
    path = grid_file(tmp_path, ('kind = "local"', 'kind = "local"\ngroup = "root"'))
    grid = read_grid(path)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.submit", "prep", str(path), "--wait"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = [grid.run.root, *(p for p in grid.run.root.rglob("*") if p.is_dir())]
    assert {oct(folder.stat().st_mode & 0o7777) for folder in folders} == {"0o2770"}
    files = [p for p in grid.run.root.rglob("*") if p.is_file()]
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o660"}
    assert list(grid.run.logs.rglob("*.pkl"))
