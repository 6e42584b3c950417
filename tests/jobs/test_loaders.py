"""Loader processes outlive the signals of a job, and never their rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
EVALUATES = """
import sys, time
from pathlib import Path
from data_prep.manifest import Manifest
from data_prep.shards import SplitReader
from hpc.env import read_env
from hpc.groups import process_group
from jobs.evaluate import evaluate
from jobs.protocol import Protocol
def forward(images):
    raise RuntimeError("Connection closed by peer")
manifest = Manifest.load(sys.argv[1])
protocol = Protocol(workers=1, eval_size=0)
with process_group(read_env({}), Path(sys.argv[1])) as group:
    reader = SplitReader(manifest, "val")
    evaluate(forward, 1, reader, len(manifest.classes), protocol, group, lambda: False)
"""


def test_an_error_in_the_middle_of_an_evaluation_ends_the_rank(streets):
    done = subprocess.run(
        [sys.executable, "-c", EVALUATES, str(streets.folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: Connection closed by peer\n")
