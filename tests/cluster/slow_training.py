"""The real training with a pause in every step, so that a bundle still runs when a test strikes,
however fast the machine is; and with a record of every step that it begins.

    python -m tests.cluster.slow_training grid CONFIG ...

is `python -m pipeline.submit` whose bundles train like this, and with `retry` for `grid` it is
`python -m pipeline.retry`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# In the run directory; without it there is no pause any more. After the seconds may stand the
# number of the last start that pauses.
PAUSE = "pause-seconds"
STEPS = "steps-begun"  # in the run directory, see `Begun`


def main(argv: Sequence[str]) -> int:
    """The job: train the bundle of a task file."""
    from jobs import train
    from jobs.training.job_run import Action, JobRun

    heartbeat, decide = JobRun.heartbeat, JobRun.decide

    def noted_heartbeat(
        run: JobRun, stage: str, step: int, total: int, force: bool = False
    ) -> None:
        if run.group.is_main and stage == "training":
            with (run.task.paths.root / STEPS).open("a") as file:
                begun = (run.bundle_key, run.generation.number, step, time.time())
                file.write(f"{' '.join(map(str, begun))}\n")
        heartbeat(run, stage, step, total, force)

    def slow_decide(run: JobRun) -> Action:
        time.sleep(pause_of(run.task.paths.root, run.generation.number))
        return decide(run)

    # in this process alone; mypy knows of no other way to take the place of a method
    JobRun.heartbeat, JobRun.decide = noted_heartbeat, slow_decide  # type: ignore[method-assign]
    return train.main(argv)


def pause_of(run: Path, start: int) -> float:
    """The seconds of a pause now, in a start of this number."""
    try:
        seconds, *last = (run / PAUSE).read_text().split()
    except FileNotFoundError:
        return 0.0
    return 0.0 if last and start > int(last[0]) else float(seconds)


class Begun(NamedTuple):
    """A step that was begun: of which bundle, by which of its starts, and when (seconds since the
    epoch)."""

    bundle: str
    generation: int
    step: int
    time: float


def all_begun(run: Path) -> list[Begun]:
    """Every step that a run has begun, in that order."""
    try:
        lines = (run / STEPS).read_text().splitlines()
    except FileNotFoundError:
        return []
    words = (line.split() for line in lines)
    return [Begun(key, int(number), int(step), float(at)) for key, number, step, at in words]


def steps_begun(run: Path, bundle: str) -> list[list[int]]:
    """The steps that each start of a bundle has begun, oldest start first."""
    starts: dict[int, list[int]] = {}
    for begun in all_begun(run):
        if begun.bundle == bundle:
            starts.setdefault(begun.generation, []).append(begun.step)
    return [starts[generation] for generation in sorted(starts)]


if __name__ == "__main__":
    from hpc.cli import run
    from pipeline import retry, submit
    from pipeline.tracking.submissions import PROGRAMS

    PROGRAMS["bundle"] = "tests.cluster.slow_training"
    run(lambda argv: retry.main(argv[1:]) if argv[0] == "retry" else submit.main(argv))
