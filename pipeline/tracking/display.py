"""Print plans and states in the terminal."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpc.cli import MissingInput, one_line
from pipeline.config.grid_file import Grid
from pipeline.tracking.snapshot import UNKNOWN, modified
from pipeline.tracking.stale import stale_line
from pipeline.tracking.submissions import GRID, REDUCE, REPORT
from pipeline.tracking.survey import STATES, CellState, Progress, Survey

if TYPE_CHECKING:  # planning, which status need not load
    from pipeline.planning.forecast import Forecast
    from pipeline.planning.plan import Plan

TOO_LARGE = (
    "do not fit into memory, even one in a job: give jobs more of it, or more nodes, in [cluster], "
    "or lower batch_size or crop"
)
MOST_ROWS = 1000  # of a table in the terminal
# numbers, and the hashes in the names of files and tasks
_NUMBER = re.compile(r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{8,}\b|[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?")
_COLOURS = {
    "done": "green",
    "running": "cyan",
    "interrupted": "yellow",
    "failed": "red",
    "stale": "yellow",
}


def describe_survey(grid: Grid, state: Survey) -> None:
    """Print how many cells are in which state, and a line for each problem."""
    for problem in state.problems:
        print(f"warning: {one_line(problem)}")
    if state.unreachable:
        print(unasked_line(state.unreachable))
    for note in grid.notes:
        print(f"note: {one_line(note)}")
    print(f"{one_line(grid.name)}: {len(grid.cells)} cells: {counts_line(state)}")
    if state.not_started:
        command = one_line(f"python -m pipeline.submit grid {grid.command_arguments}")
        print(f"{state.not_started} jobs wait, but no process starts them; `{command}` does")
    if stale := state.count("stale"):
        print(one_line(stale_line(grid, stale)))
    if tight := sum(c.state == "failed" and not state.fits_memory(c.cell) for c in state.cells):
        print(f"{tight} cells {TOO_LARGE}")


def describe_missing(missing: Iterable[MissingInput]) -> None:
    """Print a line for each input that must be there when the grid is submitted."""
    for line in dict.fromkeys(one_line(str(error)) for error in missing):
        print(f"note: missing: {line}")


def unasked_line(why: str) -> str:
    """Return a line that says that the queue cannot be asked, and `why`."""
    return f"note: the queue cannot be asked from here, so states are from files: {one_line(why)}"


def stage_lines(state: Survey) -> Iterator[str]:
    """Yield `reduce: waiting (Dependency)` for each stage beside training that waits or runs."""
    named = [("pre-training", job) for job in state.pretraining.values()]
    named += [(stage, job) for job, stage in state.stages.items()]
    for name, job in named:
        known = state.jobs.get(job, UNKNOWN)  # "" of a task whose job only the queue knows
        far = state.training_backbones.get(job)
        parts = [f"{known.state}{f' ({known.why})' if known.why else ''}"]
        parts += [*(_progress(far) if far else ()), *([f"job {job}"] if job else [])]
        yield f"{name}: {', '.join(parts)}"


def failure_lines(grid: Grid, state: Survey) -> Iterator[str]:
    """Yield a line for each stage, and each pre-training, that failed."""
    for failure in state.failed:
        command = f"python -m pipeline.logs {failure.kind} {grid.command_arguments}"
        yield f"{failure}, job {failure.job}; see `{command}`"


def outdated_lines(grid: Grid, state: Survey) -> Iterator[str]:
    """Yield a line if results.h5 lacks the counts of cells that finished later, and one if the page
    shows older results. There is none while a job that makes them again waits or runs."""
    results, page = modified(grid.run.results), modified(grid.run.page)
    command, coming = "python -m pipeline.submit", set(state.stages.values())
    newer = sum(modified(path) > results for path in state.counts.values()) if results else 0
    if newer and REDUCE not in coming:
        yield (
            f"results.h5 is older than the counts of {newer} cells; "
            f"`{command} reduce {grid.command_arguments}` updates it"
        )
    if page and page < results and REPORT not in coming:
        again = f"`{command} report {grid.command_arguments}`"
        yield f"the page is older than results.h5; {again} updates it"


def _progress(far: Progress) -> Iterator[str]:
    """Yield `step 12 of 40`, `1.50 steps/s`, `0:00:18 left`, as far as each is known."""
    yield f"step {far.step} of {far.total}" if far.total else f"step {far.step}"
    if far.rate:
        yield f"{far.rate:.2f} steps/s"
        yield f"{time_left(far)} left"


def counts_line(state: Survey) -> str:
    """Return `3 done, 5 running`."""
    counts = [(state.count(name), name) for name in STATES]
    return ", ".join(f"{count} {name}" for count, name in counts if count) or "none"


def describe_plan(
    grid: Grid, state: Survey, plan: Plan, stages: Sequence[str], forecast: Forecast
) -> None:
    """Print what a submission would do and cost."""
    describe_survey(grid, state)
    print(f"stages: {', '.join(stages)}")
    if GRID not in stages:
        return
    table = Table("data set", "models", "losses", "seed", "cells", "from step")
    table.add_column("job", overflow="fold")
    for task in plan.pretrain:
        cell = task.cells[0]
        seed = str(cell.protocol.pretrain.seed)
        words = (cell.dataset, "backbone", "CE", seed, "-", "-", task.name)
        table.add_row(*map(literal, words))
    for task in plan.bundles[:MOST_ROWS]:
        models = sorted({cell.model for cell in task.cells})
        losses = list(dict.fromkeys(cell.loss.name for cell in task.cells))
        dataset, models_below = literal(task.cells[0].dataset), Text("\n".join(models))
        step = state.steps.get(task.cells[0].signature, 0)
        numbers = (task.cells[0].seed, len(task.cells), step)
        others = [" ".join(losses), *map(str, numbers), task.name]
        table.add_row(dataset, models_below, *map(literal, others))
    console().print(table)
    if (more := len(plan.bundles) - MOST_ROWS) > 0:
        print(f"and {more} more jobs")
    num_cells = sum(len(task.cells) for task in plan.bundles)
    print(
        f"would submit {len(plan.bundles)} jobs for {num_cells} cells and {len(plan.pretrain)} "
        f"to pre-train backbones, in {one_line(str(grid.run.root))}"
    )
    for line in forecast.lines(plan.bundles):
        print(one_line(line))


def console(width: int = 160) -> Console:
    """Return a console that is `width` columns wide where there is no terminal to fit into: whole
    names fit into the default."""
    out = Console(file=sys.stdout)  # it looks at the encoding only of a file that it is given
    if not out.is_terminal:
        out.width = width
    return out


def literal(name: str) -> Text:
    """Return a name as text without markup or control characters. rich reads brackets in a plain
    string as markup, and a terminal obeys control characters."""
    return Text(one_line(name))


def cells_overview(cells: Sequence[CellState]) -> Table:
    """Return a table of how many cells are in which state, one row per data set and model."""
    table = Table("data set", "model", *STATES)
    counts: dict[tuple[str, str], Counter[str]] = {}
    for cell in cells:
        counts.setdefault((cell.cell.dataset, cell.cell.model), Counter())[cell.state] += 1
    for names, of in counts.items():
        numbers = (f"{of[state]}" if of[state] else "" for state in STATES)
        table.add_row(*map(literal, names), *numbers)
    return table


def cells_lines(cells: Sequence[CellState]) -> Iterator[str]:
    """Yield one line per cell, as `cells_table` shows it. The layout of a table of thousands takes
    seconds."""
    for cell in cells:
        yield one_line("  ".join([cell.cell.name, *filter(None, _words(cell))]))


def cells_table(cells: Sequence[CellState], whole: bool = False) -> Table:
    """Return a table of one row per cell: state, step, rate, time left, and reason. Unless `whole`,
    cells that failed for one reason share a row."""
    table = Table()
    table.add_column("cell", overflow="fold")  # its name is what other commands take
    for heading in ("state", "step", "steps/s", "time left"):
        table.add_column(heading, no_wrap=True)
    table.add_column("why", overflow="fold")
    for cell, others in _rows(cells, whole):
        state, *numbers, why = _words(cell)
        coloured = Text(state, style=_COLOURS.get(state, ""))
        name = f"{cell.cell.name} and {others} more" if others else cell.cell.name
        table.add_row(literal(name), coloured, *numbers, literal(why))
    return table


def _rows(cells: Sequence[CellState], whole: bool) -> list[tuple[CellState, int]]:
    """Return the cells that have a row, each with the number of others that share it."""
    shared = [] if whole else [c for c in cells if c.why and c.state in ("failed", "missing")]
    others = {id(group[0]): len(group) - 1 for group in by_reason(shared)}
    hidden = {id(cell) for cell in shared} - others.keys()
    return [(cell, others.get(id(cell), 0)) for cell in cells if id(cell) not in hidden]


def _words(cell: CellState) -> tuple[str, str, str, str, str]:
    return (
        cell.state,
        f"{cell.step}/{cell.total}" if cell.total else str(cell.step or ""),
        f"{cell.rate:.2f}" if cell.rate else "",
        time_left(cell),
        cell.why,
    )


def time_left(far: CellState | Progress) -> str:
    """Return the time left at the present rate as `1:02:03`; "" if there is no rate."""
    if not far.rate:
        return ""
    seconds = int((far.total - far.step) / far.rate)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def by_reason(cells: Iterable[CellState]) -> list[list[CellState]]:
    """Return the cells grouped by state and reason, in the order of the first of each group.
    Reasons that differ only in the cell's own name or in numbers are one."""
    grouped: dict[tuple[str, str], list[CellState]] = {}
    for cell in cells:
        grouped.setdefault((cell.state, _pattern(cell)), []).append(cell)
    return list(grouped.values())


def _pattern(cell: CellState) -> str:
    own = cell.why.replace(cell.cell.name, "<cell>").replace(cell.cell.signature, "<cell>")
    return _NUMBER.sub("<number>", own)


def reason_lines(cells: Iterable[CellState], with_state: bool = True) -> Iterator[str]:
    """Yield a line for each reason: the cell, or how many cells and an example."""
    for group in by_reason(cells):
        first = group[0]
        words = " ".join(filter(None, [first.state if with_state else "", first.why]))
        if len(group) == 1:
            yield f"{first.cell.name}: {words}".rstrip()
        else:
            yield f"{len(group)} cells: {words}; for example {first.cell.name}"
