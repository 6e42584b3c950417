"""Judge the effect of each fault from the record of begun steps, and a run of the chaos test."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from tests.cluster.slow_training import Begun


@dataclass(frozen=True)
class Strike:
    """A fault that struck a bundle.

    `generation` is the start that was running, `saved` the step of its newest checkpoint, and
    `most_redone` the number of steps that may be repeated.
    """

    kind: str
    bundle: str
    generation: int
    saved: int
    most_redone: int


@dataclass(frozen=True)
class Outcome:
    """The effect of a strike.

    `unsaved` is the number of begun steps beyond the checkpoint, `redone` that of repeated steps.
    `seconds` pass between the last step before the strike and the first step beyond it. `uncounted`
    is the reason why the strike does not count, `harm` the forbidden effect; both may be "".
    """

    kind: str
    unsaved: int = 0
    redone: int = 0
    seconds: float = 0.0
    uncounted: str = ""
    harm: str = ""


def judge(strike: Strike, record: Sequence[Begun]) -> Outcome:
    """Return the effect of a strike on a finished bundle.

    It counts only if it interrupted a start with unsaved progress, and a later start continued.
    """
    steps = [begun for begun in record if begun.bundle == strike.bundle]
    struck = [begun for begun in steps if begun.generation == strike.generation]
    after = [begun for begun in steps if begun.generation > strike.generation]
    if strike.saved == 0:
        return Outcome(strike.kind, uncounted="it struck before the first checkpoint")
    if not struck or not after:
        return Outcome(strike.kind, uncounted="no training was interrupted")
    last, resumed = struck[-1], after[0].step
    unsaved, redone = last.step + 1 - strike.saved, max(0, last.step + 1 - resumed)
    if unsaved < 1:
        return Outcome(strike.kind, uncounted="nothing was unsaved")
    beyond = next((begun for begun in after if begun.step > last.step), after[-1])
    harm = ""
    if resumed == 0:
        harm = f"it began anew, and had a checkpoint of step {strike.saved}"
    elif redone > strike.most_redone:
        harm = f"{redone} steps were done twice, and {strike.most_redone} would have been allowed"
    elif resumed > last.step + 1:
        harm = f"steps {last.step + 1} to {resumed - 1} were never done"
    return Outcome(strike.kind, unsaved, redone, beyond.time - last.time, harm=harm)


def judge_all(strikes: Sequence[Strike], record: Sequence[Begun]) -> list[Outcome]:
    """Return the effect of each strike; only the first strike on a start counts."""
    outcomes: list[Outcome] = []
    struck: set[tuple[str, int]] = set()
    for strike in strikes:
        outcome, start = judge(strike, record), (strike.bundle, strike.generation)
        if start in struck:
            outcome = Outcome(strike.kind, uncounted="that start had been struck before")
        struck.add(start)
        outcomes.append(outcome)
    return outcomes


def failures(
    outcomes: Sequence[Outcome], wanted: int, missing: Collection[str], different: Collection[str]
) -> list[str]:
    """Return a line for each reason why the run fails, none if it passes."""
    counted = sum(not outcome.uncounted for outcome in outcomes)
    lines = [f"{outcome.kind}: {outcome.harm}" for outcome in outcomes if outcome.harm]
    if counted < max(1, wanted):
        lines.append(f"{counted} faults were counted, and {max(1, wanted)} were wanted")
    if missing:
        lines.append(f"{len(missing)} cells are missing: {', '.join(sorted(missing))}")
    if different:
        lines.append(f"{len(different)} cells differ: {', '.join(sorted(different))}")
    return lines


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the lines of a Markdown table, a row for each kind of fault and one for all."""
    yield "| fault | struck | counted | steps redone | at most | seconds lost (median) | at most |"
    yield "|---|---|---|---|---|---|---|"
    by_kind: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_kind.setdefault(outcome.kind, []).append(outcome)
    for kind, struck in [*sorted(by_kind.items()), ("all", list(outcomes))]:
        counted = [outcome for outcome in struck if not outcome.uncounted]
        redone = [outcome.redone for outcome in counted] or [0]
        lost = [outcome.seconds for outcome in counted] or [0.0]
        numbers = (len(struck), len(counted), sum(redone), max(redone))
        seconds = (f"{value:.0f}" for value in (median(lost), max(lost)))
        yield f"| {' | '.join([kind, *map(str, numbers), *seconds])} |"
