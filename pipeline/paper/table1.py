"""Lay out scores as the paper's Table 1, and write the layout as CSV, Markdown and LaTeX.

Models are blocks, losses are rows, and data sets stand side by side with six scores each, in two
digits. The table of differences to the paper has the same layout.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from data_prep.weights import PRE_FINE
from pipeline.paper.reference import Difference
from pipeline.scores.evidence import Key
from pipeline.scores.score_table import LABELS, PAPER_SCORES, Row, latex_escaped, markdown_escaped

FOOTNOTES = {
    "a": "The paper's figure contradicts the accuracy or recall and the calibration of its own "
    "row by more than rounding.",
    "b": "The published code drops the class weights of a loss that has no second term: the "
    "paper's WCE is plain CE, its WDL plain DL. CE and DL stand beside those rows.",
    "c": "Defined on one side only: ours / the paper's.",
}


_SHRUNK = r"\resizebox{\linewidth}{!}{\usebox0}"


@dataclass(frozen=True)
class Value:
    """One number as text, with a mark if it is the best of its column, and its footnotes."""

    text: str
    best: bool = False
    notes: str = ""


@dataclass(frozen=True)
class Line:
    """One loss: six values for each data set (None if not trained there), and common footnotes."""

    loss: str
    cells: tuple[tuple[Value, ...] | None, ...]
    notes: str


@dataclass(frozen=True)
class Table1Layout:
    """Data sets side by side, and (model, lines) for each model."""

    datasets: tuple[str, ...]
    blocks: tuple[tuple[str, tuple[Line, ...]], ...]

    @property
    def footnotes(self) -> dict[str, str]:
        """Return the footnotes that some value or line carries."""
        lines = [line for _, block in self.blocks for line in block]
        values = [value for line in lines for cell in line.cells for value in cell or ()]
        notes = {note for line in lines for note in line.notes}
        notes |= {note for value in values for note in value.notes}
        return {letter: text for letter, text in FOOTNOTES.items() if letter in notes}


def means(table: Iterable[Row]) -> dict[Key, dict[str, float]]:
    """Return the paper's six scores of every row as means over seeds."""
    return {
        (row.dataset, row.model, row.loss): {s: row.scores[s].mean for s in PAPER_SCORES}
        for row in table
    }


def table1(scores: Mapping[Key, Mapping[str, float]]) -> Table1Layout:
    """Return Table 1 of these means.

    The best S_rec of each data set and model is marked, by the unrounded mean and without pre-fine.
    """
    best: dict[tuple[str, str], float] = {}
    for (dataset, model, loss), of in scores.items():
        if loss != PRE_FINE and not math.isnan(of["s_rec"]):
            best[dataset, model] = max(of["s_rec"], best.get((dataset, model), -math.inf))
    return _layout(
        {
            key: tuple(
                Value(f"{of[s]:.2f}",
                      s == "s_rec" and key[2] != PRE_FINE and of[s] == best.get(key[:2]))
                for s in PAPER_SCORES
            )
            for key, of in scores.items()
        }
    )  # fmt: skip


def difference_table(differences: Iterable[Difference]) -> Table1Layout:
    """Return the table of our scores minus the paper's, with a sign."""
    cells: dict[Key, tuple[Value, ...]] = {}
    notes = {}
    for one in differences:
        key = (one.dataset, one.model, one.loss)
        cells[key] = (*cells.get(key, ()), _difference(one))
        notes[one.loss] = "b" * one.unweighted
    return _layout(cells, notes)


def to_csv(layout: Table1Layout) -> str:
    """Return the table as CSV: dataset, model, loss and six scores in each line."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["dataset", "model", "loss", *PAPER_SCORES])
    for model, lines in layout.blocks:
        for line in lines:
            for dataset, cell in zip(layout.datasets, line.cells, strict=True):
                if cell:
                    writer.writerow([dataset, model, line.loss, *(value.text for value in cell)])
    return file.getvalue()


def to_markdown(layout: Table1Layout) -> str:
    """Return a Markdown table for each model, with the marked values in bold."""
    columns = [f"{markdown_escaped(d)} {LABELS[s]}" for d in layout.datasets for s in PAPER_SCORES]
    parts = []
    for model, lines in layout.blocks:
        head = [["Loss", *columns], ["---", *["---:"] * len(columns)]]
        body = [[_markdown_loss(one), *_texts(one, _markdown_value)] for one in lines]
        table = "".join(f"| {' | '.join(row)} |\n" for row in head + body)
        parts.append(f"**{markdown_escaped(model)}**\n\n{table}")
    parts += [f"<sup>{letter}</sup> {text}\n" for letter, text in layout.footnotes.items()]
    return "\n".join(parts)


def to_latex(layout: Table1Layout) -> str:
    """Return a LaTeX `tabular` for \\input, shrunk if it is wider than the line.

    The document must load graphicx.
    """
    count = len(PAPER_SCORES)
    spans = [rf"\multicolumn{{{count}}}{{c}}{{{latex_escaped(d)}}}" for d in layout.datasets]
    labels = [_latex_label(score) for score in PAPER_SCORES] * len(layout.datasets)
    lines = [
        "% needs \\usepackage{graphicx}",
        r"\noindent\begingroup\setlength{\tabcolsep}{3pt}%",
        rf"\sbox0{{\begin{{tabular}}{{l{(' ' + 'r' * count) * len(spans)}}}",
        r"\hline",
        _latex_line(["", *spans]),
        _latex_line(["Loss", *labels]),
    ]
    for model, block in layout.blocks:
        width = 1 + count * len(spans)
        heading = rf"\multicolumn{{{width}}}{{l}}{{\textit{{{latex_escaped(model)}}}}}"
        lines += [r"\hline", heading + r" \\"]
        lines += [_latex_line([_latex_loss(one), *_texts(one, _latex_value)]) for one in block]
    lines += [r"\hline", r"\end{tabular}}%", rf"\ifdim\wd0>\linewidth {_SHRUNK}\else\usebox0\fi"]
    lines.append(r"\endgroup")
    lines += [
        rf"\par\noindent{{\footnotesize $^{letter}$ {latex_escaped(text)}}}"
        for letter, text in layout.footnotes.items()
    ]
    return "\n".join([*lines, ""])


def _layout(
    cells: Mapping[Key, tuple[Value, ...]], notes: Mapping[str, str] = MappingProxyType({})
) -> Table1Layout:
    datasets = tuple(dict.fromkeys(dataset for dataset, _, _ in cells))
    losses: dict[str, dict[str, None]] = {}  # of a model, in the order of the grid
    for _, model, loss in cells:
        losses.setdefault(model, {})[loss] = None
    return Table1Layout(
        datasets,
        tuple(
            (
                model,
                tuple(
                    Line(
                        loss,
                        tuple(cells.get((dataset, model, loss)) for dataset in datasets),
                        notes.get(loss, ""),
                    )
                    for loss in of_model
                ),
            )
            for model, of_model in losses.items()
        ),
    )


def _difference(one: Difference) -> Value:
    notes = "a" * one.doubtful
    ours, paper = one.ours.mean, one.paper
    if math.isnan(ours) and math.isnan(paper):
        return Value("=", notes=notes)
    if math.isnan(one.value):
        return Value(f"{ours:.2f}/{paper:.2f}", notes=notes + "c")
    return Value(f"{one.value:+z.2f}", notes=notes)


def _texts(line: Line, write: Callable[[Value], str]) -> list[str]:
    empty = [""] * len(PAPER_SCORES)
    return [text for cell in line.cells for text in (map(write, cell) if cell else empty)]


def _markdown_loss(line: Line) -> str:
    return markdown_escaped(line.loss) + _markdown_notes(line.notes)


def _markdown_value(value: Value) -> str:
    return (f"**{value.text}**" if value.best else value.text) + _markdown_notes(value.notes)


def _markdown_notes(notes: str) -> str:
    return f"<sup>{notes}</sup>" if notes else ""


def _latex_loss(line: Line) -> str:
    return latex_escaped(line.loss) + _latex_notes(line.notes)


def _latex_value(value: Value) -> str:
    text = rf"\textbf{{{value.text}}}" if value.best else value.text
    return text + _latex_notes(value.notes)


def _latex_notes(notes: str) -> str:
    return f"$^{{{notes}}}$" if notes else ""


def _latex_label(score: str) -> str:
    return rf"$S_\mathrm{{{score[2:]}}}$" if score.startswith("s_") else LABELS[score]


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
