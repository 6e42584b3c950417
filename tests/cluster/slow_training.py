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

PAUSE = "pause-seconds"  # in the run directory; without it there is no pause any more
STEPS = "steps-begun"  # in the run directory: generation and step of each that was begun


def main(argv: Sequence[str]) -> int:
    """The job: train the bundle of a task file."""
    from jobs import train
    from jobs.run import Action, Run

    beat, decide = Run.beat, Run.decide

    def noted_beat(run: Run, stage: str, step: int, total: int, force: bool = False) -> None:
        if run.group.is_main and stage == "training":
            with (run.task.paths.root / STEPS).open("a") as file:
                file.write(f"{run.generation.number} {step}\n")
        beat(run, stage, step, total, force)

    def slow_decide(run: Run) -> Action:
        time.sleep(pause_of(run.task.paths.root))
        return decide(run)

    Run.beat, Run.decide = noted_beat, slow_decide  # type: ignore[method-assign]
    return train.main(argv)


def pause_of(run: Path) -> float:
    """The seconds of a pause now."""
    try:
        return float((run / PAUSE).read_text())
    except FileNotFoundError:
        return 0.0


def steps_begun(run: Path) -> list[list[int]]:
    """The steps that each start of a run's only bundle has begun, oldest start first."""
    starts: dict[int, list[int]] = {}
    for line in (run / STEPS).read_text().splitlines():
        generation, step = map(int, line.split())
        starts.setdefault(generation, []).append(step)
    return [starts[generation] for generation in sorted(starts)]


if __name__ == "__main__":
    from hpc.command import run
    from pipeline import retry, submit

    submit._PROGRAMS["bundle"] = "tests.cluster.slow_training"
    run(lambda argv: retry.main(argv[1:]) if argv[0] == "retry" else submit.main(argv))
