"""`python -m pipeline.report [CONFIG]`: results.h5 -> table.csv, table.md, table.tex, the files of
`pipeline.paper.comparison`, and one self-contained page, index.html."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc import cli
from hpc.storage.atomic import new_files, write_text
from pipeline.config.grid_file import find_config, read_grid
from pipeline.paper.comparison import analyse, write_files
from pipeline.rendering import figures, page
from pipeline.rendering.figure_data import write_figure_data
from pipeline.rendering.figure_selection import select
from pipeline.rendering.figure_style import PNG_DPI
from pipeline.rendering.terminal import print_table
from pipeline.scores.results_file import Results, read_results, refuse_fewer
from pipeline.scores.score_table import Row, blocks, rows, to_csv, to_latex, to_markdown

CSS_DPI = 96  # what a browser takes for an inch
MOST_DATASETS = 12  # whose classes are drawn
MOST_SCHEDULES = 12  # drawn of a grid that is not drawn whole
_OF_BLOCKS = ("trade-off", "recall", "calibration", "confusion")


@dataclass(frozen=True)
class ReportPaths:
    """What a report consists of, beside the files of its analysis."""

    csv: Path
    markdown: Path
    latex: Path
    page: Path


def main(argv: Sequence[str]) -> None:
    """Write the report of a grid's results and print its table."""
    parser = cli.argument_parser("python -m pipeline.report", __doc__)
    parser.add_argument("config", nargs="?", help="the grid file; default: the only one near")
    parser.add_argument("--allow-fewer", action="store_true",
                        help="replace a report that has more finished cells")  # fmt: skip
    arguments = parser.parse_args(argv)
    run = read_grid(find_config(arguments.config)).run
    results = read_results(run.results)
    table = rows(results)
    paths = write_report(results, table, run.report, arguments.allow_fewer)
    print_table(results, table, paths.page)


def write_report(
    results: Results, table: Sequence[Row], folder: Path, allow_fewer: bool = False
) -> ReportPaths:
    """Write the report of `results`, whose `rows` are `table`, into `folder`. Equal results give
    equal files.

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
        found = analyse(results, table)
        write_files(found, beside)
        write_figure_data(results, table, beside)
        write_text(new.page, page.render(results, table, sections(results, table), found))
    return paths


def _paths(folder: Path) -> ReportPaths:
    return ReportPaths(
        folder / "table.csv", folder / "table.md", folder / "table.tex", folder / "index.html"
    )


def sections(results: Results, table: Sequence[Row]) -> list[page.Section]:
    """The page's figures by topic; a topic without figures is left out."""
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
    return [
        page.Section(topic, drawn, selection.left_out if topic in _OF_BLOCKS else "")
        for topic, drawn in topics.items()
        if drawn
    ]


def _svg(title: str, image: bytes) -> page.Drawn:
    return page.Drawn(title, _data_uri("image/svg+xml", image))


def _png(title: str, image: bytes) -> page.Drawn:
    # drawn finer than the screen, so that it stays sharp; a PNG's width is in bytes 16 to 19
    pixels = int.from_bytes(image[16:20], "big")
    return page.Drawn(title, _data_uri("image/png", image), round(pixels * CSS_DPI / PNG_DPI))


def _data_uri(kind: str, image: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(image).decode('ascii')}"


if __name__ == "__main__":
    cli.run(main)
