"""Train a grid of four bundles under random faults, and compare it with an undisturbed training.

    python -m tests.cluster.chaos [--faults 50] [--seed 0]       as root, on Debian or Ubuntu

The program starts its own Slurm cluster on this machine. Every cell must be equal bit for bit.

A fault counts only if it interrupted a start with unsaved progress, as the record of steps shows.
Until enough faults have counted, the grid is trained again in a new run directory. The seed fixes
the drawn faults, but not their time.

Prints a Markdown table. The exit code is 1 if a cell is missing or differs, if a start
repeated more steps than its last checkpoint allows, or if too few faults counted.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from hpc.storage.atomic import Damaged, read_json
from jobs.spec.cell import Cell, bundles
from jobs.spec.counts_file import counted_cells
from pipeline.config.grid_file import Grid
from pipeline.tracking import snapshot
from pipeline.tracking.submissions import Submitted, submissions
from tests.cluster.bundle_runs import (
    CHECKPOINT_SECONDS,
    WORLD_SIZE,
    bundle_grid,
    pack_streets,
    undisturbed,
    write_profile,
)
from tests.cluster.chaos_record import Outcome, Strike, failures, judge_all, table
from tests.cluster.faults import KINDS, Victim, give_disk
from tests.cluster.slow_training import PAUSE, all_begun
from tests.cluster.slurm_cluster import PYTHON, Cluster, NoCluster
from tests.jobs.small_runs import assert_same, results

NUM_BUNDLES = 4
NUM_NODES = 2 * NUM_BUNDLES + 2  # all bundles train at once, and a lost node has a replacement
LOSSES = ("CE", "DLNWCE", "WCE")
EPOCHS = 30  # of two steps
STEP_SECONDS = 0.4  # at least, so that faults find a running job
# each job has two whole nodes, so that a fault affects one job only
PROFILE = {"cpus_per_task": 8, "array_parallelism": NUM_BUNDLES}
LAST_STEPS = 8  # of a bundle, in which it is not struck
DELAY = 2.0  # seconds, the longest wait before a strike
TWO_CHECKPOINTS = "killed, newest checkpoint cut short"
PATIENCE = 1800.0  # seconds for a round


@dataclass
class ChaosOptions:
    """The number and kinds of faults, the seed, and the size of the grid."""

    faults: int
    seed: int
    kinds: Sequence[str] = tuple(KINDS)
    num_bundles: int = NUM_BUNDLES
    profile: dict[str, object] = field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
    """Start a cluster, run the faults on it, and end it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=50, help="number of faults that must count")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn faults")
    options = parser.parse_args(argv)
    try:
        cluster = Cluster(NUM_NODES)
    except NoCluster as error:
        sys.exit(f"error: {error}")
    try:
        return run_chaos(
            cluster, cluster.runs / "chaos", ChaosOptions(options.faults, options.seed)
        )
    finally:
        cluster.end()


def run_chaos(cluster: Cluster, folder: Path, options: ChaosOptions) -> int:
    """Train rounds of the grid until enough faults have counted, and print the result.

    Returns 0 if the run passes, else 1.
    """
    folder.mkdir()
    data = pack_streets(folder / "streets")
    rng = random.Random(options.seed)
    deck, outcomes, number = draw(rng, options.kinds, options.faults), [], 0
    missing: set[str] = set()
    different: set[str] = set()
    with ThreadPoolExecutor(1) as pool:
        # concurrently with the first round, which mostly waits
        alone = pool.submit(undisturbed, grid_of(folder / "undisturbed", data, options.num_bundles))
        while number == 0 or (deck and not missing):
            number += 1
            current = Round(cluster, folder / f"round{number}", data, options)
            strikes = current.train(deck, rng)
            record = all_begun(current.grid.run.root)
            judged = judge_all(strikes, record)
            outcomes += judged
            deck = deck[len(strikes) :] + [outcome.kind for outcome in judged if outcome.uncounted]
            found = results(current.grid.run)
            expected = alone.result()
            missing |= expected.keys() - found.keys()
            different |= set(differing(found, expected))
            log(f"round {number} is done: {len(found)} cells")
            if all(outcome.uncounted for outcome in judged):
                break  # another round would not help
    return conclude(outcomes, options, number, missing, different)


def conclude(
    outcomes: Sequence[Outcome],
    options: ChaosOptions,
    rounds: int,
    missing: Collection[str],
    different: Collection[str],
) -> int:
    """Print the table and the verdict; return the exit code."""
    print("\n".join(table(outcomes)))
    for outcome in outcomes:
        if outcome.uncounted:
            print(f"not counted: {outcome.kind}: {outcome.uncounted}")
    wrong = failures(outcomes, options.faults, missing, different)
    for line in wrong:
        print(f"error: {line}")
    cells = len(LOSSES) * options.num_bundles
    if not wrong:
        print(f"{rounds} times {cells} cells, all bit for bit as undisturbed (seed {options.seed})")
    return 1 if wrong else 0


def draw(rng: random.Random, kinds: Sequence[str], number: int) -> list[str]:
    """Return `number` kinds of faults in random order; their frequencies differ by at most 1."""
    drawn: list[str] = []
    while len(drawn) < number:
        drawn += rng.sample(kinds, len(kinds))
    return drawn[:number]


def grid_of(folder: Path, data: str, num_bundles: int) -> Grid:
    """Return the grid whose run is in `folder`."""
    return bundle_grid(folder, data, seeds=range(num_bundles), losses=LOSSES, epochs=EPOCHS)


def differing(found: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> Iterator[str]:
    """Yield the names of the cells whose weights or counts differ in any bit."""
    for name in found.keys() & wanted.keys():
        try:
            assert_same(found[name], wanted[name])
        except AssertionError:
            yield name


class Round:
    """One run of the grid, from its submission until all its cells are done."""

    def __init__(self, cluster: Cluster, folder: Path, data: str, options: ChaosOptions) -> None:
        self.cluster = cluster
        self.grid = grid_of(folder, data, options.num_bundles)
        self.run = self.grid.run
        self._bundles: dict[str, list[Cell]] = bundles(self.grid.cells)
        for key in self._bundles:
            give_disk(self.run, key, cluster)
        self._profile = write_profile(folder, **{**PROFILE, **options.profile})
        self._pause = self.run.root / PAUSE
        self._pause.write_text(str(STEP_SECONDS))

    def train(self, deck: Sequence[str], rng: random.Random) -> list[Strike]:
        """Train all cells, strike with the kinds of `deck` in turn, and return the strikes.

        The training may end before all kinds are used.
        """
        strikes: list[Strike] = []
        deadline = time.monotonic() + PATIENCE
        while unfinished := self._unfinished():
            if time.monotonic() > deadline:
                log(f"given up: {len(unfinished)} bundles are not done; {self._queue()}")
                break
            if any(self._is_lost(key, self._queue()) for key in unfinished):
                self._submit()
            if len(strikes) == len(deck):
                self._pause.unlink(missing_ok=True)
            elif strike := self._strike(deck[len(strikes)], rng):
                strikes.append(strike)
            time.sleep(0.2)
        return strikes

    def _strike(self, kind: str, rng: random.Random) -> Strike | None:
        """Strike a random bundle with a fault of `kind`; return None if no bundle can be struck."""
        victims = [victim for victim in self._victims() if _can_be_struck(victim, kind)]
        if not victims:
            return None
        victim, rank = rng.choice(victims), rng.randrange(WORLD_SIZE)
        time.sleep(rng.uniform(0, DELAY))
        if victim.job not in self._running() or not _can_be_struck(victim, kind):
            return None
        intervals = 2 if kind == TWO_CHECKPOINTS else 1
        most_redone = intervals * math.ceil(CHECKPOINT_SECONDS / STEP_SECONDS)
        (generation, step), saved = _newest_start(victim), victim.steps_saved[-1]
        strike = Strike(kind, victim.bundle, generation, saved, most_redone)
        began = time.monotonic()
        with KINDS[kind](victim, rank):
            pass
        healed = f"healed after {time.monotonic() - began:.0f} s"
        log(f"{kind}: rank {rank} of {victim.job} at step {step}, {saved} saved; {healed}")
        return strike

    def _victims(self) -> list[Victim]:
        running = self._running()
        return [
            Victim(self.cluster, task.job, self.run, key)
            for key, task in self._tasks().items()
            if task.job in running
        ]

    def _tasks(self) -> dict[str, Submitted]:
        """Return the last submission of each bundle."""
        keys = {cell.signature: cell.bundle_key for cell in self.grid.cells}
        return {keys[task.cells[0]]: task for task in submissions(self.run)}

    def _unfinished(self) -> list[str]:
        done = counted_cells(self.run.counts)
        return [key for key, cells in self._bundles.items() if cells[0].signature not in done]

    def _queue(self) -> dict[str, str]:
        """Return the state of each job in the queue, by job id."""
        lines = self.cluster.answer("squeue", "--noheader", "--array", "--format=%i %T")
        return dict(line.split() for line in lines.splitlines())

    def _running(self) -> set[str]:
        return {job for job, word in self._queue().items() if word == "RUNNING"}

    def _is_lost(self, key: str, queue: Collection[str]) -> bool:
        """Return True if `grid` would resubmit the bundle, because its job is known to be dead."""
        task = self._tasks().get(key)
        if task is None:
            return True
        try:
            beat = read_json(self.run.progress_of(task.task))
        except (FileNotFoundError, Damaged):
            beat = {}
        return task.job not in queue and snapshot._heart_stopped(beat, time.time())

    def _submit(self) -> None:
        command = [PYTHON, "-m", "tests.cluster.slow_training", "grid", self.grid.path]
        said = self.cluster.answer(*command, "--cluster", self._profile)
        log("; ".join(line for line in said.splitlines() if "submitted" in line))


def _newest_start(victim: Victim) -> tuple[int, int]:
    """Return the generation of a bundle's newest start, and its last begun step.

    They are (0, -1) until the job, which may have been requeued, begins a step.
    """
    # the time of the start tells a requeued job from the start that was struck before
    started = datetime.fromisoformat(victim.cluster.job(victim.job)["StartTime"]).timestamp()
    own = [begun for begun in all_begun(victim.run.root) if begun.bundle == victim.bundle]
    if not own or own[-1].time < started:
        return 0, -1
    return own[-1].generation, own[-1].step


def _can_be_struck(victim: Victim, kind: str) -> bool:
    """Return True if a bundle has progress since a checkpoint and is not near its end."""
    saved = victim.steps_saved
    if len(saved) < (2 if kind == TWO_CHECKPOINTS else 1):
        return False
    return saved[-1] <= _newest_start(victim)[1] < 2 * EPOCHS - LAST_STEPS


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
