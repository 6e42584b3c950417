"""Each check of the login node is broken once: that line says FAIL and what to do, and no other
does. Slurm's answers are faked, files and disks are real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc import node_facts
from pipeline import doctor
from tests.jobs.job_processes import tree
from tests.pipeline.fake_site import CONFIG, FakeSite, profile_file
from tests.pipeline.grids import grid_file
from tests.test_layers import REPOSITORY

PUBLISHED = "deeplabv3_mobilenet_v3_large-fc3c493d.pth"


@pytest.fixture
def site(tmp_path, monkeypatch) -> FakeSite:
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


def failures(lines: list[str]) -> list[str]:
    return [line.removeprefix("FAIL  ") for line in lines if line.startswith("FAIL")]


def only_failure(found: tuple[int, list[str]]) -> str:
    """The one line that fails, while the others go on."""
    code, lines = found
    assert code == 1
    (line,) = failures(lines)
    assert lines[-1].startswith("skip  the nodes: "), "and it went on to the end"
    return line


def test_a_healthy_grid_passes_every_check(examine, site, tmp_path):
    before = tree(tmp_path)
    code, lines = examine()
    assert code == 0
    assert not [line for line in lines if not line.startswith(("pass  ", "skip  "))]
    skipped = [line for line in lines if line.startswith("skip")]
    assert skipped == ["skip  the nodes: only --on-nodes asks them"]
    left = {path for path in tree(tmp_path) if not path.startswith("slurm/")} - before.keys()
    assert left == {"grid.toml", "site.toml"}, "what the test itself wrote"
    assert all("--test-only" in words for words in site.asked("sbatch"))


def test_what_it_asks_sbatch_about_is_what_grid_would_send(examine, site):
    examine(extra={"reservation": "course", "exclusive": True})
    words = {word for word in site.asked("sbatch")[0] if word.startswith("--")}
    assert words >= {
        "--partition=gpu", "--account=vision", "--qos=long", "--constraint=v100", "--exclude=n4",
        "--gres=gpu:v100:4", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=10",
        "--time=1200", "--mem=184320M", "--reservation=course", "--exclusive", "--test-only",
    }  # fmt: skip


THREE = "nodes = 2, but only 0 of the partition's 3 have"
# what is asked for; the check that fails, and what it says
PROFILES = [
    ({"partition": "gpus"}, "partition", "there is no partition 'gpus'; did you mean 'gpu'?"),
    ({"account": "visions"}, "account", "account = 'visions' is no account of "),
    ({"qos": "longer"}, "quality of service", "there is no quality of service 'longer'; did you"),
    ({"qos": "gold"}, "quality of service", "you may not use qos = 'gold', only long, normal"),
    ({"minutes": 1441}, "time limit", "minutes = 1441, but the partition gpu allows 1440; set"),
    ({"constraint": "a100"}, "features of the nodes", f"{THREE} the features 'a100'; there are"),
    ({"constraint": "v100&big"}, "features of the nodes", f"{THREE} the features 'v100&big'; "),
    ({"cpus_per_task": 11}, "CPUs of a node", f"{THREE} 44 CPUs; the most is 40, so set tasks_"),
    ({"memory_gb": 188}, "memory of a node", f"{THREE} 192512 MB of memory; the most is 192000"),
    ({"gres": "gpu:a100:4"}, "GPUs of a node", f"{THREE} 4 GPUs of kind a100; the most is 0, so"),
    ({"gres": "", "gpus_per_node": 5, "qos": "normal"}, "GPUs of a node", f"{THREE} 5 GPUs; the"),
    ({"mpi": "pmi3"}, "MPI type", "srun has no MPI type 'pmi3'; did you mean"),
    ({"setup": ["if true; then"]}, "set-up lines", "the shell cannot read them ("),
    ({"max_jobs": 151}, "jobs in the queue", "max_jobs = 151, but the qos long lets you have 150"),
]


@pytest.mark.parametrize(("profile", "what", "said"), PROFILES)
def test_a_profile_that_asks_for_what_is_not_there(examine, profile, what, said):
    assert only_failure(examine(**profile)).startswith(f"{what}: {said}")


@pytest.mark.parametrize("profile", [
    {"constraint": "a100|v100"},
    {"constraint": "[rack1*2&rack2*2]"},  # for sbatch to judge
    {"partition": "cpu,gpu"},
    {"partition": None, "qos": None},  # the default partition has such nodes too
    {"gres": "", "mpi": None, "account": "teaching", "qos": "normal", "minutes": 1440},
])  # fmt: skip
def test_a_profile_that_asks_for_it_in_other_words(examine, profile):
    assert examine(**profile)[0] == 0


def test_too_many_nodes(examine):
    code, lines = examine(nodes=4, exclude="", gpus_per_node=2, gres="gpu:v100:2")
    assert code == 0
    code, lines = examine(nodes=4, gpus_per_node=2, gres="gpu:v100:2")
    assert (
        "nodes of the partition: nodes = 4, but the partition has 3, without those that it "
        in (failures(lines)[0])
    )


def test_more_in_one_job_than_accounting_allows(examine):
    found = examine(nodes=3)
    assert only_failure(found).startswith(
        "limits of one job: a job takes gres/gpu = 12, but the qos long allows 8; ask for less"
    )


SHORT = "minutes = 1200, but"
REFUSED = "sbatch: error: Batch job submission failed: Job violates policy"
SITES = [
    ("partition", {"state": "DOWN"}, "partition", "the partition 'gpu' is DOWN; choose another"),
    ("partition", {"accounts": "physics"}, "partition", "the partition 'gpu' does not take 'visi"),
    ("partition", {"time": "10:00:00"}, "time limit", f"{SHORT} the partition gpu allows 600; set"),
    (
        "partition",
        {"most": "1"},
        "nodes of the partition",
        "nodes = 2, but the partition gpu gives",
    ),
    (
        "qos",
        "long||12:00:00|\n",
        "time limit",
        f"{SHORT} the qos long allows 720; set minutes = 720",
    ),
    ("assoc", "vision||long|200|30|\n", "time limit", f"{SHORT} the account vision allows 30; set"),
    ("assoc", "", "account", "accounting knows no account of "),
    (
        "mpi",
        "srun: MPI types are...\nsrun: none\nsrun: openmpi\n",
        "MPI type",
        "srun has no MPI ty",
    ),
    ("refuse", REFUSED, "a training job, as sbatch sees it", f"sbatch says: {REFUSED}; mend what"),
]


@pytest.mark.parametrize(("where", "change", "what", "said"), SITES)
def test_a_site_that_has_or_allows_less(examine, site, where, change, what, said):
    if isinstance(change, dict):
        site.partition(**change)
    else:
        site.answer(where, change)
    assert only_failure(examine()).startswith(f"{what}: {said}")


def test_nodes_that_are_down_are_a_warning(examine, site):
    site.node(state="DOWN*+DRAIN")
    code, lines = examine(nodes=3, gpus_per_node=2, gres="gpu:v100:2")
    assert code == 0
    (line,) = [line for line in lines if line.startswith("warn")]
    assert line.startswith("warn  nodes that are up: n1 cannot take jobs now, which leaves 2 of 3")


def test_without_accounting_its_checks_are_left_out(examine, site):
    site.answer("accounting_is_off")
    code, lines = examine(max_jobs=0)
    assert code == 0
    skipped = [line.split(":")[0] for line in lines if "accounting does not answer" in line]
    assert skipped == ["skip  account", "skip  quality of service", "skip  limits of one job"]


def test_nor_is_an_account_needed_where_slurm_wants_none(examine, site):
    site.answer("assoc", "")
    site.answer("config", CONFIG.format("none"))
    code, lines = examine()
    assert code == 0
    assert [line for line in lines if line.startswith("skip  account: accounting knows no account")]


def test_a_controller_that_does_not_answer_fails_once_and_the_rest_goes_on(examine, site):
    site.answer("silent")
    code, lines = examine()
    assert code == 1
    assert failures(lines)[0].startswith("partition: scontrol says: slurm_load: Unable to contact")
    assert [line for line in lines if line.startswith("pass  data set streets")]


def test_where_there_is_no_slurm_the_files_are_checked_all_the_same(examine, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    found = examine()
    assert only_failure(found).startswith("scheduler: there is no sbatch on PATH; is this a Slurm")


def on_disk(monkeypatch, **numbers: int) -> None:
    """The disk of every folder has other numbers."""
    honest = os.statvfs

    def told(path):
        found = honest(path)
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_favail")
        return SimpleNamespace(**{**{name: getattr(found, name) for name in names}, **numbers})

    monkeypatch.setattr(os, "statvfs", told)


def test_a_run_directory_that_others_may_write_to(examine, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o777)
    assert only_failure(examine()).startswith(
        f"run directory: {run} can be written to by everybody"
    )
    assert run.stat().st_mode & 0o777 == 0o777, "it is not for the doctor to mend"


def test_a_full_disk(examine, monkeypatch):
    on_disk(monkeypatch, f_bavail=10)
    assert "make room or set run_dir to another disk" in only_failure(examine())


def test_a_disk_that_takes_no_more_files(examine, monkeypatch):
    on_disk(monkeypatch, f_files=1000, f_favail=3)
    line = only_failure(examine())
    assert line.startswith("files on its disk: ")
    assert "but its disk takes 3 more; remove some" in line


def test_a_disk_that_counts_no_files(examine, monkeypatch):
    on_disk(monkeypatch, f_files=0, f_favail=0)
    assert examine()[0] == 0


def test_a_missing_shard(examine, shards):
    (shards / "val-00000.h5").unlink()
    line = only_failure(examine())
    assert line.startswith(f"data set streets: {shards}/val-00000.h5 cannot be read: No such file")


def test_a_flipped_byte_in_a_shard(examine, shards):
    flip(shards / "train-00000.h5")
    line = only_failure(examine())
    assert line.startswith(f"data set streets: {shards}/train-00000.h5 is damaged")
    assert "run `python -m data_prep.pack CONFIG` again" in line


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_large_shards_are_left_to_the_nodes(examine, shards, monkeypatch):
    monkeypatch.setattr(doctor, "_QUICK_BYTES", 0)
    flip(shards / "train-00000.h5")
    code, lines = examine()
    assert code == 0
    (line,) = [line for line in lines if "data set streets" in line]
    assert "0.0 MB read" in line


def test_a_data_set_that_is_not_packed_yet_is_no_failure(examine, shards):
    shutil.rmtree(shards)
    code, lines = examine()
    assert code == 0
    assert [
        line for line in lines if line.startswith("skip  data set streets: not packed yet; `py")
    ]


def test_one_that_was_packed_with_other_settings_is(examine):
    line = only_failure(examine(("train = 6", "train = 7")))
    assert "was packed with other settings than [dataset.streets] has now" in line


def test_a_weights_file_that_is_missing(examine, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    code, lines = examine(('weights = "none"', 'weights = "imagenet"'))
    assert code == 1
    assert all("fetch it where there is internet with" in line for line in failures(lines))
    assert [line.split(":")[0] for line in failures(lines)] == [
        "weights imagenet for deeplabv3_mobilenet_v3_large",
        "weights imagenet for fcn_mobilenet_v3_large",
    ]


def test_a_weights_file_that_is_corrupt(examine, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = tmp_path / "torch/hub/checkpoints" / PUBLISHED
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    only_deeplab = ('"fcn_mobilenet_v3_large", ', "")
    line = only_failure(examine(only_deeplab, ('weights = "none"', 'weights = "coco"')))
    assert line.startswith("weights coco for deeplabv3_mobilenet_v3_large: ")
    assert "is damaged (its SHA-256 does not start with fc3c493d); delete it" in line


def test_software_that_is_not_installed(examine, monkeypatch):
    def version(name):
        if name == "mpi4py":
            raise node_facts.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(node_facts.metadata, "version", version)
    line = only_failure(examine())
    assert line.startswith("software here: mpi4py not installed; install with")


def test_a_check_that_breaks_is_a_line_and_the_others_go_on(examine, monkeypatch):
    def broken(*_arguments):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(doctor, "require_private", broken)
    line = only_failure(examine())
    assert line.startswith(
        r"run directory: the check itself failed (ZeroDivisionError: two\nlines); please report it"
    )


def test_what_fails_here_is_not_sent_to_the_nodes(examine, site):
    code, lines = examine(arguments=["--on-nodes"], partition="gpus")
    assert code == 1
    assert lines[-1] == "skip  the nodes: a job would meet what fails above; mend it first"
    assert not site.asked("sbatch")


def test_a_mistake_in_the_grid_file_is_exit_code_2(refusal, tmp_path):
    config = grid_file(tmp_path, ("epochs = 2", "epoch = 2"))
    assert "unknown key 'epoch'" in refusal(doctor.main, config)
    config = grid_file(tmp_path, ('kind = "local"', 'kind = "local"\npartitoin = "x"'))
    assert "unknown key 'partitoin'" in refusal(doctor.main, config)


def test_the_login_node_loads_neither_torch_nor_hdf5_nor_mpi(tmp_path, shards):
    config = grid_file(tmp_path)
    code = (
        "import sys; from pipeline import doctor; code = doctor.main(sys.argv[1:]); "
        "print('heavy:', *sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'torchvision', 'h5py', 'mpi4py'})); sys.exit(code)"
    )
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    line = [sys.executable, "-c", code, str(config)]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:"
    assert "pass  data set streets" in done.stdout
