"""Measure the commands of the login node on a large run, whose counts are real files.

    python -m benchmarks.scale [--cells 10000] [--keep DIR]

Each command is a new process, as a user starts it. CPU is user plus system time; other load changes
it less than the wall time. The exit code is 1 if a command exceeds its bound or the page is too
large.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.large_run import (
    CLASSES,
    LOSSES,
    MODELS,
    large_grid,
    write_finished,
    write_submission,
)
from benchmarks.measure import users_environment
from hpc.scheduler.auto import open_queue
from pipeline.config.grid_file import read_grid
from pipeline.submission.decision import cells_to_submit, plan_of
from pipeline.tracking.survey import survey

PER_SEED = len(CLASSES) * len(MODELS) * len(LOSSES)
BOUNDS = {  # seconds for 10,000 cells; in-process times exclude the start of Python
    "plan (in-process)": 2.0,
    "submit grid --dry-run": None,
    "status (in-process)": 1.0,
    "status": None,
    "reduce": 5.0,
    "mpiexec -n 2 reduce": 5.0,
    "report": 60.0,
}
PAGE_MB = 10.0
Seconds = tuple[float, float]  # wall, CPU


def main() -> int:
    """Write the run, measure, and print a table; return 1 if a bound is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=10_000, help=f"a multiple of {PER_SEED}")
    parser.add_argument("--keep", metavar="DIR", help="write the run to DIR and keep it")
    options = parser.parse_args()
    if options.cells < 1 or options.cells % PER_SEED:
        parser.error(f"--cells must be a multiple of {PER_SEED}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(options.keep or name)
        folder.mkdir(exist_ok=True)
        return _measure(folder.absolute(), options.cells // PER_SEED)


def _measure(folder: Path, seeds: int) -> int:
    grid = large_grid(folder, seeds)
    config = str(grid.path)
    print("| what | wall s | CPU s | bound s |\n|---|---:|---:|---:|")
    late = [
        *_row("plan (in-process)", _in_new_process(_plan, config)),
        *_row("submit grid --dry-run", _command("pipeline.submit", "grid", config, "--dry-run")),
    ]
    write_finished(grid, write_submission(grid))
    late += _row("status (in-process)", _in_new_process(_survey, config))
    late += _row("status", _command("pipeline.status", config))
    late += _row("reduce", _command("pipeline.reduce", config))
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if mpiexec.exists():
        launcher = (str(mpiexec), "-n", "2")
        late += _row("mpiexec -n 2 reduce", _command("pipeline.reduce", config, launcher=launcher))
    late += _row("report", _command("pipeline.report", config))
    page = (grid.run.report / "index.html").stat().st_size / 1e6
    print(f"| page, MB | {page:.1f} | | {PAGE_MB:g} |")
    late += ["page"] * (page > PAGE_MB)
    print(f"{len(grid.cells)} cells, load {os.getloadavg()[0]:.1f} at the end")
    print(f"over their bounds: {', '.join(late) or 'none'}")
    return 1 if late else 0


def _row(what: str, found: Seconds) -> list[str]:
    """Print a row; return its name if it exceeds its bound."""
    wall, cpu = found
    bound = BOUNDS[what]
    print(f"| {what} | {wall:.1f} | {cpu:.1f} | {bound or ''} |", flush=True)
    return [what] if bound and wall > bound else []


def _plan(config: str) -> None:
    """Plan from the grid file to the tasks of a submission."""
    grid = read_grid(config)
    state = survey(grid, open_queue(grid.cluster, grid.run.logs, grid.run.queue))
    assert plan_of(grid, state, cells_to_submit(state, "grid"), {}).bundles


def _survey(config: str) -> None:
    grid = read_grid(config)
    state = survey(grid, open_queue(grid.cluster, grid.run.logs, grid.run.queue))
    assert state.count("done") == len(grid.cells)


def _in_new_process(work: Callable[[str], None], config: str) -> Seconds:
    """Measure `work` in a new process, without its start and without this one's memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_timed, work, config).result()


def _timed(work: Callable[[str], None], config: str) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    work(config)
    return time.perf_counter() - wall, time.process_time() - cpu


def _command(module: str, *arguments: str, launcher: tuple[str, ...] = ()) -> Seconds:
    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    wall, cpu = time.perf_counter(), used()
    done = subprocess.run(
        [*launcher, sys.executable, "-m", module, *arguments],
        capture_output=True, text=True, check=False, env=users_environment(),
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - wall, used() - cpu


if __name__ == "__main__":
    sys.exit(main())
