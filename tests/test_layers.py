"""Imports go downward, planning stays cheap, and the lowest layer knows nothing of the science."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROW = re.compile(r"^\| ([a-z_.]+) \| ([a-z_., ]*)\|$", re.MULTILINE)

Table = dict[str, set[str]]


def layer_table(design: str) -> Table:
    """Return the imports that the table under `## Layers and subpackages` allows each layer."""
    section = (
        design.split("## Layers and subpackages", 1)[1].split("\n## ", 1)[0].split("|---|", 1)[1]
    )
    return {
        m[1]: {word for word in re.split(r"[, ]+", m[2]) if word} for m in ROW.finditer(section)
    }


def layer_of(module: str, table: Table) -> str | None:
    """The innermost layer that a module belongs to; None if it is not one of ours."""
    owners = [layer for layer in table if f"{module}.".startswith(f"{layer}.")]
    return max(owners, key=len, default=None)


def imported(source: str, package: str) -> Iterator[str]:
    """The modules that a file of `package` imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(above if node.level else []), *([node.module] if node.module else [])]
            )
            # `from jobs import losses` imports a package, `from jobs.train import main` does not
            yield from (f"{base}.{alias.name}" for alias in node.names)


def upward_imports(root: Path, table: Table) -> list[str]:
    """A line for each import under `root` that the table does not allow."""
    found = []
    for top in sorted({layer.split(".")[0] for layer in table}):
        for path in sorted((root / top).rglob("*.py")):
            package = ".".join(path.relative_to(root).parent.parts)
            own = layer_of(f"{package}.{path.stem}", table)
            assert own is not None
            for module in imported(path.read_text(encoding="utf-8"), package):
                if layer_of(module, table) and not may_import(own, module, table):
                    found.append(f"{path.relative_to(root)} imports {module}")
    return found


def may_import(layer: str, module: str, table: Table) -> bool:
    """A layer may import itself, its own parts, what its row names, and their parts."""
    return any(f"{module}.".startswith(f"{allowed}.") for allowed in {layer, *table[layer]})


def cycles(table: Table) -> list[str]:
    """The packages that may import themselves by way of others."""

    def reached(room: str, seen: set[str]) -> set[str]:
        for other in table.get(room, set()) - seen:
            seen |= {other} | reached(other, seen | {other})
        return seen

    return [room for room in table if room in reached(room, set())]


TABLE = layer_table((REPOSITORY / "docs/design.md").read_text(encoding="utf-8"))


def test_the_table_names_every_package():
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"tests"}
    assert {layer for layer in TABLE if "." not in layer} == packages
    inner = {
        f"{package}.{path.parent.name}"
        for package in packages
        for path in REPOSITORY.glob(f"{package}/*/__init__.py")
    }
    assert {layer for layer in TABLE if "." in layer} == inner
    assert cycles(TABLE) == []
    assert TABLE["pipeline"] == {"jobs", "data_prep", "hpc"}
    assert TABLE["hpc"] == TABLE["jobs.losses"] == set()


def test_imports_go_downward_only():
    assert upward_imports(REPOSITORY, TABLE) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("hpc/scheduler/auto.py", "import jobs.spec.cell"),
        ("hpc/scheduler/auto.py", "from data_prep import settings"),
        ("data_prep/pack.py", "def later():\n    from jobs.spec.cell import Cell"),
        ("data_prep/sources/folder.py", "if True:\n    import pipeline"),
        ("jobs/spec/cell.py", "from pipeline.config.grid_file import read_grid"),
        ("jobs/losses/functional.py", "from jobs.spec.protocol import Protocol"),
        ("jobs/losses/functional.py", "from ..spec.cell import Cell"),
        ("jobs/losses/functional.py", "from .. import spec"),
        ("jobs/losses/functional.py", "from jobs.models.registry import MODELS"),
        ("jobs/metrics/counts.py", "class C:\n    def f(self):\n        import hpc.storage.atomic"),
    ],
)
def test_a_made_up_upward_import_is_caught(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"import json\n{line}\n")
    assert len(upward_imports(tmp_path, TABLE)) == 1
    assert upward_imports(tmp_path, TABLE)[0].startswith(f"{file} imports ")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("pipeline/config/grid_file.py", "from jobs.losses.grammar import Knot"),
        ("jobs/train.py", "from jobs.losses import functional"),
        ("jobs/losses/functional.py", "from . import pooling"),
        ("jobs/losses/functional.py", "from jobs.losses.grammar import Knot"),
        ("hpc/scheduler/auto.py", "import jobsets, pipelines.grid"),
    ],
)
def test_a_downward_import_is_not(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"{line}\n")
    assert upward_imports(tmp_path, TABLE) == []


CHEAP = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
if sys.argv[1] != "-":
    from pipeline import submit
    from pipeline.config.grid_file import read_grid
    from pipeline.planning.plan import make_plan
    grid = read_grid(sys.argv[1])
    plan = make_plan(grid, grid.cells, {}, (), {})
    assert sum(len(task.cells) for task in plan.bundles) == len(grid.cells) > 0
    assert len(plan.pretrain) == 1
    assert submit.main(["grid", sys.argv[1], "--dry-run"]) == 0
loaded = {name.split(".")[0] for name in sys.modules}
print("heavy:", *sorted(loaded & {"torch", "torchvision", "h5py", "mpi4py"}))
"""
# what looks at a run, or only says how it is used, need not read pictures nor send jobs
LOOKING = """
import sys
from pipeline import cancel, logs, status, submit
assert status.main([sys.argv[1]]) == 0
loaded = {name.split(".")[0] for name in sys.modules}
print("heavy:", *sorted(loaded & {"torch", "h5py", "mpi4py", "numpy", "PIL", "submitit", "scipy"}))
"""

# nor does status load what plans
STATUS = """
import sys
from pipeline import status
assert status.main([sys.argv[1]]) == 0
planning = {"pipeline.planning.plan", "pipeline.planning.forecast", "concurrent.futures"}
print("planning:", *sorted(planning & sys.modules.keys()))
"""

PLANNING = (
    "pipeline.submit",
    "pipeline.status",
    "pipeline.doctor",
    "pipeline.config.grid_file",
    "pipeline.planning.preflight",
    "pipeline.tracking.survey",
    "pipeline.submission.wait",
    "jobs.spec.cell",
    "jobs.spec.protocol",
    "jobs.spec.task",
    "jobs.losses.grammar",
    "jobs.models.registry",
    "data_prep.settings",
    "data_prep.shards.manifest",
    "data_prep.weights",
    "hpc.scheduler.auto",
    "hpc.storage.checkpoint",
    "hpc.distributed.launcher",
)


def _fresh(*arguments: str, folder: Path, program: str = CHEAP) -> subprocess.CompletedProcess[str]:
    """A program of the login node in a Python of its own."""
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    line = [sys.executable, "-c", program, *arguments]
    return subprocess.run(line, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)


def test_planning_imports_neither_torch_nor_hdf5_nor_mpi(tmp_path):
    packages = [
        ".".join(path.relative_to(REPOSITORY).parent.parts)
        for top in ("hpc", "data_prep", "jobs", "pipeline")
        for path in (REPOSITORY / top).rglob("__init__.py")
    ]
    assert "data_prep.sources" in packages
    done = _fresh(str(REPOSITORY / "configs/demo.toml"), *PLANNING, *packages, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:"
    assert "would submit" in done.stdout
    assert list(tmp_path.iterdir()) == []  # a dry run writes nothing


def test_status_imports_nothing_that_reads_pictures_or_sends_jobs(tmp_path):
    done = _fresh(str(REPOSITORY / "configs/demo.toml"), folder=tmp_path, program=LOOKING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:"
    assert "missing" in done.stdout


def test_status_loads_nothing_that_plans(tmp_path):
    done = _fresh(str(REPOSITORY / "configs/demo.toml"), folder=tmp_path, program=STATUS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "planning:"


def test_a_program_that_does_import_one_is_noticed(tmp_path):
    done = _fresh("-", "pipeline.scores.results_file", folder=tmp_path)
    assert done.stdout.splitlines()[-1] == "heavy: h5py"


SCIENCE = re.compile(
    r"\b(segment\w*|pixels?|label(s| maps?)?|loss(es)?|dice|focal|logits?|void|crops?|"
    r"class(es)? (weights?|pixels?)|confusion|backbones?|bundles?|cells?|shards?|epochs?|seeds?|"
    r"data ?sets?|images?|resnet\w*|deeplab\w*|fcn|cityscapes|camvid|voc|coco)\b",
    re.IGNORECASE,
)


def words_of_segmentation(text: str) -> list[str]:
    return [match[0] for match in SCIENCE.finditer(text)]


def test_what_a_cluster_gives_holds_no_word_of_segmentation():
    files = sorted((REPOSITORY / "hpc").rglob("*.py"))
    assert len(files) > 10
    found = {path.name: words_of_segmentation(path.read_text()) for path in files}
    assert {name: words for name, words in found.items() if words} == {}


def test_such_a_word_would_be_found():
    assert words_of_segmentation("the label maps of a data set") == ["label maps", "data set"]
    assert words_of_segmentation("Resume each cell of the bundle") == ["cell", "bundle"]
    assert words_of_segmentation("cells_per_job, lossless, @classmethod, a class") == []
