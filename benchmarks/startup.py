"""Measure commands of the login node that have almost nothing to do, and their slowest imports.

    python -m benchmarks.startup [CONFIG]     CONFIG: a finished grid, for status and `all`

Each command is a new process, in turns with an empty Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from statistics import median

from benchmarks.measure import time_in_turns, time_text, users_environment

ROUNDS = 7
SLOWEST = 6  # packages that are listed
# from an empty queue until the queue reports the end of a job that does nothing
_LOCAL_JOB = """
import tempfile
import time
from pathlib import Path
from hpc.scheduler.job import ModuleCall
from hpc.scheduler.cluster_profile import ClusterProfile
from hpc.scheduler.auto import open_queue

with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
    profile = ClusterProfile(kind="local")
    queue = open_queue(profile, Path(name, "logs"), Path(name, "queue"))
    call = ModuleCall("timeit", ("-n1", "-r1", "pass"))
    (job,) = queue.submit([call], profile.single(), "job")
    while queue.job_states([job])[job].state != "gone":
        time.sleep(0.02)
"""


def main() -> None:
    """Print a table of commands, and the slowest imports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="a grid file whose cells are all done")
    config = parser.parse_args().config
    commands = {
        "an empty Python": ["-c", ""],
        "import pipeline.submit": ["-c", "import pipeline.submit"],
        "import pipeline.status": ["-c", "import pipeline.status"],
        "pipeline.submit --help": ["-m", "pipeline.submit", "--help"],
        "a job of the local queue": ["-c", _LOCAL_JOB],
    }
    if config:
        local = [config, "--cluster", "local"]  # there may be a Slurm too
        again = ["-m", "pipeline.submit", "all", *local, "--wait"]
        commands["pipeline.status CONFIG"] = ["-m", "pipeline.status", *local]
        commands["pipeline.report CONFIG"] = ["-m", "pipeline.report", config]
        commands["pipeline.submit all CONFIG --wait, again"] = again
    found = time_in_turns({name: _command(line) for name, line in commands.items()}, ROUNDS)
    print("| command | median | least to most |\n|---|---:|---:|")
    for name, seconds in found.items():
        spread = f"{time_text(min(seconds))} to {time_text(max(seconds))}"
        print(f"| {name} | {time_text(median(seconds))} | {spread} |")
    for module in ("pipeline.submit", "pipeline.status"):
        slowest = ", ".join(f"{name} {time_text(s)}" for name, s in imported(module)[:SLOWEST])
        print(f"\nimporting {module}, its own time: {slowest}")


def imported(module: str) -> list[tuple[str, float]]:
    """Return the packages that `module` loads and the seconds of their modules, slowest first."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        capture_output=True, text=True, check=True, env=users_environment(),
    )  # fmt: skip
    packages: dict[str, float] = {}
    for line in done.stderr.splitlines()[1:]:
        own, _, name = line.removeprefix("import time:").split("|")
        package = name.strip().split(".")[0]
        packages[package] = packages.get(package, 0.0) + float(own) / 1e6
    return sorted(packages.items(), key=lambda entry: -entry[1])


def _command(arguments: list[str]) -> Callable[[], object]:
    line = [sys.executable, *arguments]
    environ = users_environment()
    return lambda: subprocess.run(line, check=True, capture_output=True, env=environ)


if __name__ == "__main__":
    main()
