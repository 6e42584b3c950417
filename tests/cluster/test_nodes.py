"""The nodes of the test cluster see only their part of this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cluster.slurm_cluster import PYTHON, REPOSITORY


@pytest.mark.slow
def test_nodes_see_a_checkout_and_its_python_below_tmp(cluster):
    with TemporaryDirectory(dir="/tmp", prefix="lossgrid a clone-") as folder:
        clone, environment = Path(folder, "clone"), Path(folder, "environment")
        shutil.copytree(REPOSITORY / "tests/cluster", clone / "tests/cluster")
        subprocess.run([PYTHON, "-m", "venv", "--without-pip", environment], check=True)
        python, program = environment / "bin/python", clone / "program.py"
        program.write_text("import sys; print(sys.prefix)\n")
        script = clone / "tests/cluster/cluster"
        cluster.fail("n1")
        try:
            cluster.answer(script, "revive", "n1", LOSSGRID_CLUSTER_PYTHON=str(python))
            said = cluster.answer("srun", "--nodelist=n1", "--chdir=/", python, program)
        finally:
            cluster.fail("n1")
            cluster.revive("n1")
    assert said == f"{environment}\n"
