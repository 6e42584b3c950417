"""Batch scripts as texts, and the folders that are refused for them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hpc.scheduler.cluster_profile import ClusterProfile
from hpc.scheduler.job import ModuleCall
from pipeline import submit as command
from pipeline.submission.batch_scripts import Part, parts, render, script
from pipeline.submission.batch_scripts import ScriptSite as Where
from tests.hpc.scheduler.test_slurm import NASTY, logs, open_slurm, slurm  # noqa: F401
from tests.pipeline.fake_queue import FakeQueue
from tests.pipeline.grids import grid_file, small_grid
from tests.pipeline.stories import planned
from tests.pipeline.submission.slurm_scripts import Site, options

# ruff: noqa: F811 (fixtures of other files)
PRETRAIN = ('weights = "none"', 'weights = "pretrain"\npretrain = {batch_size = 2}')
REPOSITORY = Path(__file__).parents[3]
V100 = {
    "partition": "gpu", "constraint": "v100", "nodes": 1, "tasks_per_node": 4, "gpus_per_node": 4,
    "cpus_per_task": 10, "memory_gb": 180, "minutes": 1200, "array_parallelism": 2,
    "setup": ["module load cuda/12.8"], "python": "python",
}  # fmt: skip
TASKS = ("camvid-seed0-5d41f0a2b7c93e18", "camvid-seed1-e09b6c3f14d8a275",
         "camvid-seed2-83a7d1f65b20c94e")  # fmt: skip


def where(profile: ClusterProfile, run: Path = Path("/project/lossgrid/runs/camvid")) -> Where:
    return Where(profile, Path("/project/lossgrid"), run, "camvid", "TOKEN")


def train_part(tasks=TASKS) -> Part:
    return Part("train", "train", [(task, "16 cells") for task in tasks])


def test_the_example_is_what_the_writer_makes():
    def code(text: str) -> list[str]:
        lines = [re.sub(r"  # .*", "", line) for line in text.splitlines()]
        return [x for x in lines if x and (not x.startswith("#") or x.startswith("#SBATCH"))]

    def sorted_options(lines: list[str]) -> list[str]:
        return sorted(line for line in lines if line.startswith("#"))

    written = code(script(where(ClusterProfile(**V100)), train_part()))
    example = code((REPOSITORY / "jobs/array.sbatch").read_text(encoding="utf-8"))
    assert sorted_options(example) == sorted_options(written)
    assert [x for x in example if x[0] != "#"] == [x for x in written if x[0] != "#"]


def test_slurm_is_told_the_same_as_by_grid(slurm, logs, tmp_path):
    profile = ClusterProfile(**{
        **V100, "account": "us", "qos": "long", "mpi": "pmi2", "network_interface": "ib0",
        "gres": "gpu:v100:4", "mail_user": "me@here", "mail_type": "END", "exclude": "node[1,2]",
        "extra": {"reservation": "it's", "exclusive": True, "overcommit": False, "nodes": 3},
    })  # fmt: skip
    queue = open_slurm(logs, **profile.model_dump())
    queue.submit(
        [ModuleCall("jobs.train", (t,)) for t in TASKS], profile.training(), "camvid-train"
    )
    path = tmp_path / "script"
    path.write_text(script(where(profile, logs.parent), train_part()))
    assert options(path) == slurm.options()

    (theirs,) = [x for x in slurm.script().splitlines() if x.startswith("srun")]
    ours = path.read_text().split("\nsrun ")[1].replace("$run", "").split()
    flags = {word for word in shlex.split(theirs) if word.startswith("--")}
    assert flags - {"--unbuffered", "--output", "--error"} <= set(ours)
    for line in profile.setup_lines():
        assert line in path.read_text().splitlines()


def test_names_and_paths_are_words_and_nothing_in_them_is_run(tmp_path):
    sbatch = ["partition", "account", "qos", "constraint", "exclude", "mail_user", "mail_type"]
    names = dict.fromkeys([*sbatch, "gres", "mpi", "network_interface"], NASTY)
    python = "echo '$(touch x) ; touch x'"
    profile = ClusterProfile(**{**V100, **names, "extra": {"comment": NASTY}, "setup": [],
                                "python": python, "group": ""})  # fmt: skip
    run, site = tmp_path / NASTY, Site(tmp_path / "site")
    for folder in ("logs", "submitted"):
        (run / folder).mkdir(parents=True)
    there = Where(profile, tmp_path / "site", run, f"{NASTY}\n#SBATCH --wrap=x\ntouch x", "TOKEN")
    part = Part("train", "train", [("task", f"{NASTY}\x1b")])
    files = render(there, [Part("prep", "prep"), part])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert subprocess.run(["bash", "-n", str(tmp_path / name)]).returncode == 0
    said = options(tmp_path / "train.sbatch")
    assert {said[key.replace("_", "-")] for key in sbatch} == {NASTY}
    assert said["comment"] == said["gres"] == NASTY
    assert said["output"] == f"{run}/logs/%A_%a_0_log.out"
    (tmp_path / "train.sbatch").rename(site.script(7))
    assert site.run(7, 0) == 0
    assert (run / "logs/7_0_0_log.out").read_text() == (
        f"$(touch x) ; touch x -m jobs.train {run}/tasks/task.json\n"
    )
    assert (run / "submitted/TOKEN-train.7").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name == "x"]


def test_arrays_are_as_long_as_the_site_allows(tmp_path):
    grid = small_grid(tmp_path, PRETRAIN, more="cells_per_job = 1\n")
    plan = planned(grid, FakeQueue(tmp_path))
    found = parts(["prep", "grid", "reduce"], plan.pretrain, plan.bundles, 3)
    assert [part.name for part in found] == ["prep", "pretrain", "train", "train-2", "train-3",
                                             "reduce"]  # fmt: skip
    assert [len(part.tasks) for part in found] == [0, 1, 3, 3, 2, 0]
    sent = render(where(ClusterProfile()), found)["submit.sh"]
    assert 'pretrain=$(send pretrain.sbatch "afterok:$prep")\n' in sent
    assert 'train_3=$(send train-3.sbatch "afterok:${pretrain}_0")\n' in sent
    assert 'reduce=$(send reduce.sbatch "afterany:$train:$train_2:$train_3")\n' in sent


def test_training_needs_no_backbone_but_its_own(tmp_path):
    """One that fails keeps only its own cells from training."""
    other = '\n[dataset.more]\nsource = "synthetic"\nshards = "x"\ntrain = 6\nval = 3\n'
    grid = small_grid(tmp_path, PRETRAIN, more=f"{other}size = [32, 40]\n")
    plan = planned(grid, FakeQueue(tmp_path))
    found = parts(["grid"], plan.pretrain, plan.bundles, 1000)
    assert [len(part.tasks) for part in found] == [2, 2, 2]
    sent = render(where(ClusterProfile()), found)["submit.sh"]
    assert 'train=$(send train.sbatch "afterok:${pretrain}_0")\n' in sent
    assert 'train_2=$(send train-2.sbatch "afterok:${pretrain}_1")\n' in sent
    trained = parts(["prep", "grid"], plan.pretrain[:1], plan.bundles, 1000)
    assert (
        'train_2=$(send train-2.sbatch "afterok:$prep")\n'
        in (render(where(ClusterProfile()), trained)["submit.sh"])
    )


def test_reduce_and_report_may_replace_more_cells_only_if_asked(tmp_path, streets):
    changes = (f"{tmp_path}/streets", str(streets)), ('kind = "local"', 'kind = "slurm"')
    words, folder = [str(grid_file(tmp_path, *changes))], tmp_path / "scripts"
    for more in ([], ["--allow-fewer"]):
        command.main(["all", *words, "--script", str(folder), *more])
        last = {path.stem: path.read_text().split()[-1] for path in folder.glob("*.sbatch")}
        end = more[0] if more else '"$run/grid.toml"'
        assert (last["reduce"], last["report"]) == (end, end)
        assert (last["prep"], last["train"]) == ('"$run/grid.toml"', '"$run/tasks/$task.json"')


def test_a_group_that_shares_the_run_may_write_its_files():
    lines = script(where(ClusterProfile(group="us")), train_part()).splitlines()
    assert "umask u=rwx,g=rwx,o=" in lines


def config(folder: Path) -> Path:
    return grid_file(folder, ('kind = "local"', 'kind = "local"\npartition = "gpu"'))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "/file is not a folder; choose another folder for --script"),
        ("file/scripts", "/file is not a folder; choose another folder for --script"),
        ("mine", "/mine holds 'notes.txt', which is not a script of ours; choose another"),
        ("own", "/own holds 'train.sbatch', which is not a script of ours; choose another"),
        ("open/scripts", "/open can be written to by everybody"),
        ("run", "/run is in the run directory; choose another folder for --script"),
        ("link/tasks", "/link/tasks is in the run directory; choose another"),
        ("streets/x", "/streets/x is in the shards folder of 'streets'; choose another"),
        ("a\0b", "--script: "),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["", "dry"])
def test_a_folder_that_cannot_be_meant_is_refused(tmp_path, refusal, place, message, more):
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.sbatch").write_text("#!/bin/bash\nsrun mine\n")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    said = refusal(command.main, "all", config(tmp_path), "--script", f"{tmp_path}/{place}", *more)
    assert message in said
    assert (tmp_path / "mine" / "notes.txt").exists()
    assert not (tmp_path / "run").exists()


def test_there_is_nothing_to_wait_for(tmp_path, refusal):
    said = refusal(command.main, "all", config(tmp_path), "--script", "scripts", "--wait")
    assert said.startswith("--wait: scripts start no jobs that one could wait for")
