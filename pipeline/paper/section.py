"""The paper's part of a report: its Table 1, the differences to it, and its claims.

Only `pipeline.report` calls this package; without it a report has the user's own results alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from pipeline.paper import claims, reference, table1
from pipeline.scores.evidence import Evidence
from pipeline.scores.results_file import Results
from pipeline.scores.score_table import LABELS, Row

_MARKS = {"holds": "✓", "holds in part": "◐", "does not hold": "✗", "cannot be judged": "?"}


@dataclass(frozen=True)
class PaperSection:
    """Texts by file name, HTML with every name escaped, and the headings by HTML id."""

    files: Mapping[str, str]
    html: str
    headings: Mapping[str, str]


def paper_section(results: Results, table: Sequence[Row], evidence: Evidence) -> PaperSection:
    """Compare a grid with the paper. `table` holds all rows of `results`, `evidence` its scores."""
    matches = {d.name: reference.match_dataset(d) for d in results.datasets}
    layout = table1.table1(table1.means(table))
    differences = reference.differences(results, table)
    judged = claims.check(evidence, {name: match.dataset for name, match in matches.items()})
    files = {
        "table1.csv": table1.to_csv(layout),
        "table1.md": table1.to_markdown(layout),
        "table1.tex": table1.to_latex(layout),
        "difference.csv": reference.differences_csv(differences),
        "claims.json": claims.to_json(judged),
        "claims.md": claims.to_markdown(judged),
    }
    html = _template().render(
        layout=layout,
        matches=matches,
        departures={name: reference.departures(results, name) for name in matches},
        difference_layout=table1.difference_table(differences),
        claims=judged,
        score_labels=[LABELS[score] for score in table1.PAPER_SCORES],
        marks=_MARKS,
        said=claims.SAID,
    )
    headings = {"table1": "Table 1", "paper": "Difference to the paper"}
    return PaperSection(files, html, {**headings, "claims": "The paper's claims"})


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("section.html")
