"""An installation has three lists of versions in step, every package and template, no path of the
machine it was written on."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
RUNTIME = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
OPTIONAL = [
    Requirement(line)
    for group in PROJECT["project"]["optional-dependencies"].values()
    for line in group
]


def pins(text: str) -> dict[str, str]:
    """The versions of the lines `NAME==VERSION`, indented or in a list or not."""
    lines = re.findall(r"^[ -]*([A-Za-z0-9_.-]+)==(\S+)$", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


CONSTRAINTS = pins((REPOSITORY / "constraints.txt").read_text(encoding="utf-8"))
ENVIRONMENT_FILE = (REPOSITORY / "environment.yml").read_text(encoding="utf-8")
ENVIRONMENT = pins(ENVIRONMENT_FILE)


@pytest.mark.parametrize("wanted", [*RUNTIME, *OPTIONAL], ids=lambda wanted: wanted.name)
def test_every_dependency_is_pinned_to_a_version_that_its_bound_allows(wanted):
    assert CONSTRAINTS[canonicalize_name(wanted.name)] in wanted.specifier


def test_the_conda_environment_has_the_runtime_dependencies_at_the_same_versions():
    expected = {name: CONSTRAINTS[name] for name in (canonicalize_name(r.name) for r in RUNTIME)}
    assert expected == ENVIRONMENT


def test_the_conda_environment_takes_torch_through_pip_and_mpi_from_the_site():
    conda, through_pip = ENVIRONMENT_FILE.split("- pip:\n")
    assert re.findall(r"^  - (\S+)$", conda, re.MULTILINE) == ["conda-forge", "python=3.11", "pip"]
    assert "torch==" in through_pip
    assert "mpich" not in ENVIRONMENT


def test_the_conda_environments_python_is_one_that_we_support():
    (version,) = re.findall(r"^  - python=([\d.]+)$", ENVIRONMENT_FILE, re.MULTILINE)
    assert version in SpecifierSet(PROJECT["project"]["requires-python"])


def test_a_pin_that_drifts_apart_is_seen():
    assert pins("- torch==2.10.0\n  - h5py==3\nnumpy>=2\n") == {"torch": "2.10.0", "h5py": "3"}


def packages() -> set[str]:
    """Return the packages that setuptools finds by the configuration."""
    setuptools = pytest.importorskip("setuptools")
    include = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    found = setuptools.find_namespace_packages(str(REPOSITORY), include=include)
    return {name for name in found if "__pycache__" not in name}


def test_every_package_of_ours_is_packaged_and_no_other():
    ours = {
        ".".join(path.relative_to(REPOSITORY).parent.parts)
        for top in ("hpc", "data_prep", "jobs", "pipeline")
        for path in (REPOSITORY / top).rglob("__init__.py")
    }
    assert {"hpc", "data_prep", "jobs", "pipeline"} < ours
    assert {"jobs.losses", "jobs.models", "jobs.metrics", "data_prep.sources"} < ours
    # a folder of data, which setuptools takes for a package
    templates = {"pipeline.rendering.templates"}
    assert packages() - templates == ours


def test_every_template_is_package_data():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    others = [
        path.relative_to(REPOSITORY)
        for top in ("hpc", "data_prep", "jobs", "pipeline")
        for path in (REPOSITORY / top).rglob("*")
        if path.is_file() and path.suffix != ".py" and path.parent.name != "__pycache__"
    ]
    assert Path("pipeline/rendering/templates/report.html") in others
    patterns = [
        f"{package.replace('.', '/')}/{pattern}" for package in data for pattern in data[package]
    ]
    for path in others:
        assert any(fnmatch(str(path), pattern) for pattern in patterns), path


MACHINE_PATH = re.compile(r"(?<![\w./}~-])/(work|root|home)/")


def test_no_tracked_file_names_a_path_of_one_machine():
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    files = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    assert len(files) > 50
    texts = {file: file.read_bytes() for file in files if file.is_file()}
    naming = [
        f"{file.relative_to(REPOSITORY)}: {match[0]}"
        for file, content in texts.items()
        if b"\0" not in content and (match := MACHINE_PATH.search(content.decode("utf-8")))
    ]
    assert naming == []


@pytest.mark.parametrize("where", ["work", "root", "home"])
def test_such_a_path_would_be_seen(where):
    assert MACHINE_PATH.search(f'root = "/{where}/data"')
    assert not MACHINE_PATH.search(f"data/{where}/x, ./{where}/x, https://a.b/{where}/x")
