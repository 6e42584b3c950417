"""The slow training in which the loss of one cell is not finite on one rank, in its second half.

    python -m tests.cluster.diverging_training grid CONFIG ...

is `python -m pipeline.submit` whose bundles train like this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.cluster import slow_training

LOSS = "CE"
RANK = 1


def main(argv: Sequence[str]) -> int:
    """The job: train the bundle of a task file."""
    from hpc.distributed.launcher import read_env
    from jobs.training import cell_trainer

    honest, rank = cell_trainer.combined_loss, read_env().rank

    def diverging(logits: Any, target: Any, loss: Any, position: float, *rest: Any) -> Any:
        value = honest(logits, target, loss, position, *rest)
        strikes = loss.name == LOSS and rank == RANK and position > 0.5
        return value * float("nan") if strikes else value

    cell_trainer.combined_loss = diverging
    return slow_training.main(argv)


if __name__ == "__main__":
    from hpc.cli import run
    from pipeline import submit
    from pipeline.tracking.submissions import PROGRAMS

    PROGRAMS["bundle"] = "tests.cluster.diverging_training"
    run(submit.main)
