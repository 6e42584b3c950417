"""The doctor's checks of a grid's files, disks and software. Each is broken once: its line says
FAIL and what to do, and no other line does."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

from hpc.diagnostics import node_facts
from pipeline import doctor
from tests.jobs.job_processes import tree
from tests.pipeline.doctor.lines import failures, flip, only_failure
from tests.pipeline.grids import grid_file
from tests.test_layers import REPOSITORY

PUBLISHED = "deeplabv3_mobilenet_v3_large-fc3c493d.pth"


def test_a_healthy_grid_passes_every_check(examine, site, tmp_path):
    before = tree(tmp_path)
    code, lines = examine()
    assert code == 0
    assert not [line for line in lines if not line.startswith(("pass  ", "skip  "))]
    skipped = [line for line in lines if line.startswith("skip")]
    assert skipped == ["skip  the nodes: not checked without --on-nodes"]
    left = {path for path in tree(tmp_path) if not path.startswith("slurm/")} - before.keys()
    assert left == {"grid.toml", "site.toml"}, "what the test itself wrote"
    assert all("--test-only" in words for words in site.asked("sbatch"))


def on_disk(monkeypatch, **numbers: int) -> None:
    """Change the numbers of the disk of every folder."""
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
    assert run.stat().st_mode & 0o777 == 0o777, "it is not for the doctor to fix"


def test_a_run_directory_without_file_locks(examine, monkeypatch):
    def flock(_file, _operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert only_failure(examine()).startswith("file locks in it: cannot lock a file in ")


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
    [path] = shards.glob("val-*.h5")
    path.unlink()
    line = only_failure(examine())
    assert line.startswith(f"data set streets: {path} cannot be read: No such file")


def test_a_flipped_byte_in_a_shard(examine, shards):
    [path] = shards.glob("train-*.h5")
    flip(path)
    line = only_failure(examine())
    assert line.startswith(f"data set streets: {path} is damaged")
    assert "run `python -m data_prep.pack CONFIG` again" in line


def test_large_shards_are_left_to_the_nodes(examine, shards, monkeypatch):
    monkeypatch.setattr(doctor, "_QUICK_BYTES", 0)
    [path] = shards.glob("train-*.h5")
    flip(path)
    code, lines = examine()
    assert code == 0
    (line,) = [line for line in lines if "data set streets" in line]
    assert "0.0 kB read" in line


def test_a_data_set_that_is_not_packed_yet_is_no_failure(examine, shards):
    shutil.rmtree(shards)
    code, lines = examine()
    assert code == 0
    assert [
        line for line in lines if line.startswith("skip  data set streets: not packed yet; `py")
    ]


def test_a_data_set_whose_images_are_not_there_is_a_failure(examine, tmp_path):
    drawn = (
        f'source = "synthetic"\nshards = "{tmp_path}/streets"\ntrain = 6\nval = 3\nsize = [32, 40]'
    )
    own = f'source = "folder"\nroot = "{tmp_path}/nowhere"\nclasses = ["road", "car"]'
    assert f"{tmp_path}/nowhere" in only_failure(examine((drawn, own)))


def test_a_data_set_packed_with_other_settings_is_a_failure(examine):
    line = only_failure(examine(("train = 6", "train = 7")))
    assert "was packed with other settings than [dataset.streets] has now (train = 6 th" in line


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


def test_no_probe_job_is_submitted_if_a_check_fails_here(examine, site):
    code, lines = examine(arguments=["--on-nodes"], partition="gpus")
    assert code == 1
    assert lines[-1] == "skip  the nodes: a job would fail for the reasons above; fix them first"
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
