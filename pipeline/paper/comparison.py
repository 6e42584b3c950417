"""Everything a report says beside its own scores: the paper's layout, the difference to the paper,
the paper's claims, and losses compared over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.storage.atomic import write_text
from pipeline.paper import reference, table1
from pipeline.paper.claims import SAID, check, to_json, to_markdown
from pipeline.paper.table1 import Layout
from pipeline.paper.verdicts import Claim
from pipeline.scores import paired_comparison
from pipeline.scores.evidence import evidence
from pipeline.scores.results_file import Results
from pipeline.scores.score_table import LABELS, Row


@dataclass(frozen=True)
class Kinship:
    """Which of the paper's data sets one is, why, and which settings are not the paper's."""

    dataset: str
    match: reference.Match
    departures: list[str]


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found, in the order of the page."""

    layout: Layout
    kinships: list[Kinship]
    differences: list[reference.Difference]
    difference_layout: Layout
    claims: list[Claim]
    comparisons: list[paired_comparison.Comparison]
    groups: list[paired_comparison.Group]
    across: paired_comparison.Group | None


def analyse(results: Results, table: Sequence[Row]) -> Analysis:
    """The analysis of a grid's results; `table` are all their rows."""
    matches = {d.name: reference.same_dataset(d) for d in results.datasets}
    seen = evidence(results, table, {name: match.dataset for name, match in matches.items()})
    groups = paired_comparison.groups(seen)
    differences = reference.differences(results, table)
    return Analysis(
        layout=table1.table1(table1.means(table)),
        kinships=[
            Kinship(d.name, matches[d.name], reference.departures(results, d.name))
            for d in results.datasets
        ],
        differences=differences,
        difference_layout=table1.difference_table(differences),
        claims=check(seen),
        comparisons=paired_comparison.comparisons(seen),
        groups=groups,
        across=paired_comparison.across(groups),
    )


def write_files(analysis: Analysis, folder: Path) -> Mapping[str, Path]:
    """Write the analysis for machines and papers; the files by name."""
    texts = {
        "table1.csv": table1.to_csv(analysis.layout),
        "table1.md": table1.to_markdown(analysis.layout),
        "table1.tex": table1.to_latex(analysis.layout),
        "difference.csv": reference.differences_csv(analysis.differences),
        "claims.json": to_json(analysis.claims),
        "claims.md": to_markdown(analysis.claims),
        "comparisons.csv": paired_comparison.to_csv(analysis.comparisons),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return {name: folder / name for name in texts}


def for_page(analysis: Analysis) -> Mapping[str, object]:
    """What the template `paper.html` asks for, beside the analysis itself."""
    return {
        "analysis": analysis,
        "score_labels": [LABELS[score] for score in table1.PAPER_SCORES],
        "compared_labels": [LABELS[score] for score in paired_comparison.COMPARED],
        "shown_pair": paired_comparison.shown,
        "marks": {"holds": "✓", "holds in part": "◐", "does not hold": "✗", "cannot be said": "?"},
        "said": SAID,
    }
