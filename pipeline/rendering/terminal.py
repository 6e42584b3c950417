"""Print a report's table in the terminal.

This module loads no matplotlib, so that a command without work to do ends at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from pipeline.rendering.figure_data import select
from pipeline.scores.results_file import Results, read_results
from pipeline.scores.score_table import LABELS, PAPER_SCORES, Row, best, rows, shown
from pipeline.tracking.display import console, literal


def print_report(results_path: str | Path, page_path: Path) -> None:
    """Print the table of `results.h5` and the path of its page."""
    results = read_results(results_path)
    print_table(results, rows(results), page_path)


def print_table(results: Results, table: Sequence[Row], page_path: Path) -> None:
    """Print the rows of `table`, the missing cells, and the path of the page."""
    out = console(width=100)  # the table's width
    if not table:
        out.print(literal("no cell is finished, so the page has no scores; run report again later"))
    for (dataset, model), block in select(table).drawn.items():
        out.print(printed_table(f"{dataset} · {model} · {len(block[0].seeds)} seeds", block))
    if left_out := select(table).left_out:
        out.print(literal(f"all {len(table)} rows are in table.csv. {left_out}"))
    missing = results.record.get("missing", [])
    if missing:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        out.print(literal(f"missing: {len(missing)} cells without counts: {names}"))
    # soft_wrap keeps the path in one line, so that a terminal can open it
    out.print(literal(f"page: {page_path}"), soft_wrap=True)


def printed_table(title: str, block: Sequence[Row]) -> Table:
    """Return the scores of one data set and model for 100 columns, the best in bold."""
    printed = Table(
        title=literal(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    printed.add_column("loss", no_wrap=True)
    for score in PAPER_SCORES:
        printed.add_column(LABELS[score], justify="right", no_wrap=True)
    champions = {score: best(block, score) for score in PAPER_SCORES}
    for row in block:
        printed.add_row(
            literal(row.loss),
            *(
                Text(shown(row.scores[s]), style="bold" if row.loss in champions[s] else "")
                for s in PAPER_SCORES
            ),
        )
    return printed
