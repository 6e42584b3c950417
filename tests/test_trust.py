"""The program loads no pickle that it did not write. No call in its source does, and a hostile
pickle in the place of one of its files is refused."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hpc.cli import UserError, run
from hpc.distributed.launcher import read_env
from hpc.distributed.process_group import process_group
from hpc.storage import checkpoint
from hpc.storage.atomic import file_sha256, read_json, write_json
from hpc.storage.fencing import claim
from jobs.spec.cell import Cell
from jobs.training.backbone import load_backbone
from jobs.training.predictor import Predictor
from pipeline import predict
from pipeline.config.grid_file import Grid
from tests.pipeline.grids import small_grid

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("hpc", "data_prep", "jobs", "pipeline")

# What runs whatever a file, a peer or a text tells it to.
MODULES = {
    "pickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "code",
}
NAMES = {"eval", "exec", "compile", "__import__", "pickle_load", "execfile"}
METHODS = {
    "system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell",
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list",
    "recv_object_list",
}  # fmt: skip
OF_MPI = {"bcast", "gather", "scatter", "allgather", "alltoall", "recv", "irecv", "sendrecv"}

# (file, call): between the ranks of one job, which one launcher started under one user.
ALLOWED = {
    ("hpc/distributed/process_group.py", "broadcast_object_list"),
    ("hpc/distributed/process_group.py", "bcast"),
    ("hpc/distributed/mpi.py", "bcast"),
    ("hpc/distributed/mpi.py", "gather"),
}


def dangers(source: str) -> Iterator[str]:
    """Yield imports and calls of a file that could load a pickle or run a text."""
    aliases: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                full = base + alias.name
                local = alias.asname or alias.name.split(".")[0]
                aliases[local] = full if base or alias.asname else local
                if full.split(".")[0] in MODULES:
                    yield full.split(".")[0]
                if full.split(".")[-1] in NAMES | METHODS or full == "torch.load":
                    yield full
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from dangers_of_call(node, aliases)


def dangers_of_call(call: ast.Call, aliases: dict[str, str]) -> Iterator[str]:
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    words = ast.unparse(call.func).split(".")
    name = ".".join([aliases.get(words[0], words[0]), *words[1:]])
    if name in NAMES or (words[-1] in NAMES and len(words) > 1 and words[0] == "builtins"):
        yield name
    # a tensor has a `gather` as well
    of_mpi = words[-1] in OF_MPI and "comm" in ".".join(words[:-1]).lower()
    if len(words) > 1 and (words[-1] in METHODS or of_mpi):
        yield words[-1]
    if name.startswith("torch.") and words[-1] == "load" and given.get("weights_only") != "True":
        yield "torch.load"
    if given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
        yield name
    if None in given:  # **options may hold anything
        yield from (["torch.load"] if words[-1] == "load" else [])


def found_in(root: Path) -> set[tuple[str, str]]:
    return {
        (str(path.relative_to(root)), danger)
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        for danger in dangers(path.read_text(encoding="utf-8"))
    }


def test_no_line_of_ours_loads_a_pickle_or_runs_a_text():
    assert found_in(REPOSITORY) == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "from submitit.core.utils import pickle_load",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "import torch as t\nt.load(path, map_location='cpu')",
        "import torch\ntorch.jit.load(path)",
        "from torch import load",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "eval(text)",
        "exec(text)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import subprocess\nsubprocess.run(text, shell=yes)",
        "import torch.distributed as dist\ndist.all_gather_object(found, mine)",
        "self._communicator.bcast(value)",
    ],
)
def test_such_a_line_would_be_found(line):
    assert list(dangers(line))


@pytest.mark.parametrize(
    "line",
    [
        "import pickletools\npickletools.genops(data)",
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
        "import subprocess\nsubprocess.run(['git'])",
        "model.eval()",
        "Manifest.load(folder)",
        "logits.gather(1, target)",
        "ranks.gather(value)",
        "import re\nre.compile(text)",
    ],
)
def test_a_harmless_line_is_not(line):
    assert list(dangers(line)) == []


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def bare(attack: Attack, path: Path) -> None:
    path.write_bytes(pickle.dumps(attack, protocol=2))


def in_a_state(attack: Attack, path: Path) -> None:
    torch.save({"network": {"weight": torch.zeros(3)}, "step": attack}, path)


def in_an_old_format(attack: Attack, path: Path) -> None:
    torch.save({"weights": attack}, path, _use_new_zipfile_serialization=False)


@pytest.fixture(params=[bare, in_a_state, in_an_old_format])
def attacked(request, tmp_path):
    """Puts an attack in the place of a file; afterwards it must not have happened."""
    folder = tmp_path / "attacked"

    def plant(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        request.param(Attack(folder), path)
        if request.param is bare:
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        folder.rmdir()  # it was made: the attack is one

    yield plant
    assert not folder.exists()


def test_a_checkpoint_of_somebody_else_is_passed_over(tmp_path, attacked):
    """With a checksum that fits, as whoever can write there makes it."""
    folder = tmp_path / "checkpoints"
    start = claim(tmp_path / "generations", ["a"])
    for step in (10, 20):
        checkpoint.save(folder, step, start, {"a": {"weight": torch.ones(2)}}, {"inputs": {}})
    newest = folder / "step-000000020-g1"
    attacked(newest / "a.pt")
    index = read_json(newest / "index.json")
    write_json(newest / "index.json", {**index, "entries": {"a": file_sha256(newest / "a.pt")}})
    step, states, _, problems = checkpoint.load_latest(folder, ["a"])
    assert step == 10
    assert torch.equal(states["a"]["weight"], torch.ones(2))
    (problem,) = problems
    assert problem.startswith(f"{newest}/a.pt is ") and "\n" not in problem


def cell_and_grid(tmp_path: Path, weights: str) -> tuple[Cell, Grid]:
    grid = small_grid(tmp_path, ('weights = "none"', f'weights = "{weights}"'))
    return grid.cells[0], grid


def refusal_of_backbone(cell: Cell, grid: Grid) -> str:
    with process_group(read_env({}), grid.run.rendezvous) as group, pytest.raises(UserError) as no:
        load_backbone(cell, grid.run, group)
    return str(no.value)


def test_a_weights_file_with_an_attack_is_refused(tmp_path, attacked):
    cell, grid = cell_and_grid(tmp_path, f"{tmp_path}/w.pt")
    attacked(tmp_path / "w.pt")
    said = refusal_of_backbone(cell, grid)
    assert said.startswith(f"{tmp_path}/w.pt is not a file of weights: ") and "\n" not in said


def test_a_pretrained_backbone_with_an_attack_is_refused(tmp_path, attacked):
    cell, grid = cell_and_grid(tmp_path, "pretrain")
    path = grid.run.backbone(cell.backbone_key)
    attacked(path)
    write_json(path.with_suffix(".json"), {"sha256": file_sha256(path)})
    said = refusal_of_backbone(cell, grid)
    assert said.startswith(f"{path} is not a file of weights: ") and "\n" not in said


def test_a_trained_head_with_an_attack_is_refused(tmp_path, attacked, capsys):
    cell, grid = cell_and_grid(tmp_path, "none")
    head = grid.run.head(cell.signature)
    attacked(head)
    with pytest.raises(SystemExit) as ended:
        run(predict.main, [str(head), "image.png", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"error: {head} is not a trained head (") and said.count("\n") == 1
    shutil.rmtree(grid.run.root)
    with process_group(read_env({}), grid.run.rendezvous) as group:
        attacked(head)
        with pytest.raises(UserError, match="is not a trained head"):
            Predictor(head, grid.run, group)
