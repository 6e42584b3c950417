"""Batch scripts with only sbatch, srun and squeue faked: sbatch keeps what it is sent, and the test
runs it, element by element, as Slurm would."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from tests.hpc.scheduler.hostile import HANDED_ON

COMMANDS = {
    "sbatch": """
        [ -e "$SITE/refuse" ] && { echo "sbatch: error: invalid partition" >&2; exit 1; }
        number=$(($(cat "$SITE/number" 2>/dev/null || echo 40) + 1)); echo $number >"$SITE/number"
        printf '%s\\n' "$*" >>"$SITE/asked"
        cp -- "${!#}" "$SITE/script.$number"
        compgen -e >>"$SITE/variables"
        echo "*** 5 days to the maintenance"
        echo "$number;cluster" """,
    "squeue": 'cat "$SITE/queue" 2>/dev/null || true',
    "scontrol": 'echo "MaxArraySize = $(cat "$SITE/max_array_size" 2>/dev/null || echo 1001)"',
    "srun": """
        name() { sed "s/%A/$SLURM_ARRAY_JOB_ID/; s/%a/$SLURM_ARRAY_TASK_ID/
                      s/%j/$SLURM_JOB_ID/; s/%t/0/" <<<"$1"; }
        while [[ $1 == --* ]]; do
            case $1 in --output=*) out=$(name "${1#*=}");; --error=*) err=$(name "${1#*=}");; esac
            shift
        done
        exec "$@" >>"$out" 2>>"$err" """,
}


class Site:
    """A cluster's login node. `folder` holds its commands, and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name, body in COMMANDS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\nSITE={shlex.quote(str(folder))}\n{body}\n")
            path.chmod(0o755)
        self.path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def asked(self) -> list[str]:
        """The arguments of every sbatch."""
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def variables(self) -> set[str]:
        """The names in the environment of any sbatch."""
        return set((self.folder / "variables").read_text().split())

    def script(self, job: int) -> Path:
        return self.folder / f"script.{job}"

    def start(self, job: int, element: int | None = None) -> subprocess.Popen[bytes]:
        """A job as Slurm starts it: in another folder than it was sent from, as its own session,
        with what the shell that sent it had left over."""
        array = {} if element is None else {
            "SLURM_ARRAY_JOB_ID": str(job), "SLURM_ARRAY_TASK_ID": str(element)
        }  # fmt: skip
        environment = {
            **os.environ,
            **HANDED_ON,
            **array,
            "PATH": self.path,
            "SLURM_JOB_ID": str(job),
        }
        return subprocess.Popen(
            ["bash", str(self.script(job))],
            cwd=self.folder, env=environment, start_new_session=True, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, job: int, element: int | None = None) -> int:
        with self.start(job, element) as process:
            process.communicate(timeout=300)
            return process.returncode


def options(script: Path) -> dict[str, str]:
    """Return the options of the `#SBATCH` lines of a script."""
    lines = script.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    found = [shlex.split(x.removeprefix("#SBATCH ")) for x in lines if x.startswith("#SBATCH ")]
    assert all(len(words) == 1 for words in found)
    pairs = [word.removeprefix("--").partition("=") for (word,) in found]
    return {key: value for key, _, value in pairs}
