"""Turn results.h5 into tables, comparisons, a comparison with the paper, and one page, index.html.

python -m pipeline.report [CONFIG]
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc import cli
from hpc.storage.atomic import new_files, write_text
from pipeline.config.grid_file import Grid, find_config, read_grid
from pipeline.paper.section import paper_section
from pipeline.rendering import figures, page
from pipeline.rendering.figure_data import select, write_figure_data
from pipeline.rendering.figure_style import PNG_DPI
from pipeline.rendering.terminal import print_table
from pipeline.scores import paired_comparison
from pipeline.scores.evidence import evidence
from pipeline.scores.results_file import Results, read_results, refuse_fewer
from pipeline.scores.score_table import Row, blocks, rows, to_csv, to_latex, to_markdown

CSS_DPI = 96  # pixels of an inch in a browser
MOST_DATASETS = 12  # data sets whose classes are drawn
MOST_SCHEDULES = 12  # schedules that are drawn if only a part of the rows is
_OF_BLOCKS = ("trade-off", "recall", "calibration", "confusion")


@dataclass(frozen=True)
class ReportPaths:
    """The main files of a report."""

    csv: Path
    markdown: Path
    latex: Path
    page: Path


def main(argv: Sequence[str]) -> None:
    """Write the report of a grid's results and print its table."""
    parser = cli.argument_parser("python -m pipeline.report", __doc__)
    parser.add_argument("config", nargs="?", help="the grid file")
    parser.add_argument("--allow-fewer", action="store_true",
                        help="let a report with fewer cells replace one with more")  # fmt: skip
    arguments = parser.parse_args(argv)
    grid = read_grid(find_config(arguments.config))
    results = read_results(grid.run.results)
    table = rows(results)
    paths = write_report(results, table, grid.run.report, arguments.allow_fewer)
    print_table(results, table, paths.page)
    if newer := _newer_counts(grid):
        print(cli.one_line(
            f"warning: {grid.run.results} is older than {newer} counts files, so the report lacks "
            f"them; run `python -m pipeline.reduce {grid.command_arguments}`, then report again"
        ))  # fmt: skip


def _newer_counts(grid: Grid) -> int:
    reduced = grid.run.results.stat().st_mtime
    return sum(path.stat().st_mtime > reduced for path in grid.run.counts.glob("*.json"))


def write_report(
    results: Results, table: Sequence[Row], folder: Path, allow_fewer: bool = False
) -> ReportPaths:
    """Write the report of `results`, whose `rows` are `table`, into `folder`.

    Equal results give equal files.

    Raises:
        UserError: the report that is there has more cells, and `allow_fewer` is False.
    """
    paths = _paths(folder)
    if not allow_fewer:
        refuse_fewer(paths.page, page.num_cells(paths.page), page.cells_of(results))
    with new_files(folder, last=paths.page.name) as beside:
        new = _paths(beside)
        write_text(new.csv, to_csv(table))
        write_text(new.markdown, to_markdown(table))
        write_text(new.latex, to_latex(table))
        seen = evidence(results, table)
        comparisons = paired_comparison.comparisons(seen)
        write_text(beside / "comparisons.csv", paired_comparison.to_csv(comparisons))
        write_figure_data(results, table, beside)
        paper = paper_section(results, table, seen)
        for name, text in paper.files.items():
            write_text(beside / name, text)
        drawn = sections(results, table)
        html = page.render(results, table, seen, drawn, paper.html, paper.headings)
        write_text(new.page, html)
    return paths


def _paths(folder: Path) -> ReportPaths:
    return ReportPaths(
        folder / "table.csv", folder / "table.md", folder / "table.tex", folder / "index.html"
    )


def sections(results: Results, table: Sequence[Row]) -> list[page.Section]:
    """Return the page's figures by topic, without the topics that have none."""
    by_name = {dataset.name: dataset for dataset in results.datasets}
    selection, found = select(table), blocks(table)
    of_block = [
        (f"{dataset} · {model}", by_name[dataset], block)
        for (dataset, model), block in selection.drawn.items()
    ]
    losses = figures.scheduled(results.record.get("losses", []))
    moving = [loss["name"] for loss in losses]
    if selection.left_out:
        losses = [loss for loss in losses if loss["name"] in selection.losses][:MOST_SCHEDULES]
    topics = {
        "overview": [_png("", figures.overview(found))] if selection.left_out else [],
        "trade-off": [
            _svg(
                " · ".join(key), figures.trade_off(found[key], moving, {row.loss for row in block})
            )
            for key, block in selection.drawn.items()
        ],
        "recall": [_png(n, figures.recall_heatmap(data, block)) for n, data, block in of_block],
        "calibration": [_svg(n, figures.reliability_diagrams(block)) for n, _, block in of_block],
        "confusion": [
            _png(n, figures.confusion_matrices(data, block)) for n, data, block in of_block
        ],
        "classes": [
            _svg(d.name, figures.class_frequencies(d)) for d in results.datasets[:MOST_DATASETS]
        ],
        "schedules": [_svg("", figures.loss_schedules(losses))] if losses else [],
    }
    notes = dict.fromkeys(_OF_BLOCKS, selection.left_out)
    notes["overview"] = figures.overview_note(found)
    return [
        page.Section(topic, drawn, notes.get(topic, "")) for topic, drawn in topics.items() if drawn
    ]


def _svg(title: str, image: bytes) -> page.Drawn:
    return page.Drawn(title, _data_uri("image/svg+xml", image))


def _png(title: str, image: bytes) -> page.Drawn:
    # The image has more pixels than the screen shows, to stay sharp when enlarged. Bytes 16 to 19
    # of a PNG hold its width.
    pixels = int.from_bytes(image[16:20], "big")
    return page.Drawn(title, _data_uri("image/png", image), round(pixels * CSS_DPI / PNG_DPI))


def _data_uri(kind: str, image: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(image).decode('ascii')}"


if __name__ == "__main__":
    cli.run(main)
