"""The paper's Table 1 (Taubert et al. 2021), and the differences of a grid's results to it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from data_prep.weights import PRE_FINE
from jobs.losses.grammar import parse_loss
from jobs.metrics.scores import Summary
from jobs.spec.protocol import Protocol
from pipeline.scores.evidence import Evidence, Key, Kind, kind_of_record, kind_of_spec
from pipeline.scores.results_file import DatasetResults, Results
from pipeline.scores.score_table import PAPER_SCORES, Row

# The published code ignores the class weights of a loss that has no second term.
UNWEIGHTED = {"WCE": "CE", "WDL": "DL"}

# Scores that break their own row's harmonic means by more than rounding.
DOUBTFUL: dict[Key, tuple[str, ...]] = {
    ("voc", "fcn_resnet101", "FL"): ("s_rec",),
    ("voc", "fcn_resnet101", "CEMP"): ("s_rec",),
    ("sbd", "fcn_resnet101", "CEMP"): ("s_rec",),
    ("cityscapes", "fcn_resnet101", "WDLAWCE"): ("s_acc", "s_rec"),
    ("voc", "deeplabv3_resnet101", "WDL"): ("s_rec",),
}

VOC_OBJECTS = frozenset(
    {"aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
     "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
     "train", "tvmonitor"}
)  # fmt: skip
# The raw ids 4 to 33. The published code also counts the ids 0 to 3 (`CITYSCAPES_VOID`).
CITYSCAPES = frozenset(
    {"static", "dynamic", "ground", "road", "sidewalk", "parking", "rail track", "building",
     "wall", "fence", "guard rail", "bridge", "tunnel", "pole", "polegroup", "traffic light",
     "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus",
     "caravan", "trailer", "train", "motorcycle", "bicycle"}
)  # fmt: skip
CITYSCAPES_VOID = frozenset({"unlabeled", "ego vehicle", "rectification border", "out of roi"})
VAL_IMAGES = {"voc": 1449, "sbd": 2857, "cityscapes": 500}

# The settings of [protocol] that are equal on all of the paper's data sets.
COMMON_SETTINGS = ("epochs", "batch_size", "learning_rate", "decay", "momentum", "weight_decay",
                   "train", "backbone_batchnorm", "naive_ramp", "alternating_ramp",
                   "bins")  # fmt: skip


@dataclass(frozen=True)
class DatasetMatch:
    """The paper's name for a data set ("" if it is not one of the paper's), and the reason."""

    dataset: str
    reason: str


@dataclass(frozen=True)
class Difference:
    """One score of a row beside the paper's.

    `ours` is over seeds. `doubtful` marks a figure of the paper that contradicts its own row.
    `unweighted` marks a row of the paper whose loss has no class weights despite its name;
    `loss` and `paper_loss` may then differ.
    """

    dataset: str
    model: str
    loss: str
    paper_dataset: str
    paper_loss: str
    score: str
    ours: Summary
    paper: float
    doubtful: bool
    unweighted: bool

    @property
    def value(self) -> float:
        """Return our mean minus the paper's; nan if either is nan."""
        return self.ours.mean - self.paper


@cache
def paper_table() -> Mapping[Key, Mapping[str, float]]:
    """Return the six scores of the paper's 100 rows by (data set, model, loss), in its order."""
    text = (files(__package__) / "table1.csv").read_text(encoding="utf-8")
    return {
        (line["dataset"], line["model"], line["loss"]): {s: float(line[s]) for s in PAPER_SCORES}
        for line in csv.DictReader(io.StringIO(text))
    }


def paper_kind(loss: str) -> Kind:
    """Return the kind of loss that the paper trained under a name; see `UNWEIGHTED`.

    pre-fine is CE.
    """
    return kind_of_spec(parse_loss("CE" if loss == PRE_FINE else UNWEIGHTED.get(loss, loss)))


def paper_evidence() -> Evidence:
    """Return the paper's table as evidence with one seed, whose scores are means of four.

    F1 is nan if a class is never right. The table does not name the class.
    """
    table = paper_table()
    return Evidence(
        scores={key: {0: row} for key, row in table.items()},
        never_right={
            key: ("one or more classes",) if math.isnan(row["f1"]) else ()
            for key, row in table.items()
        },
        kinds={loss: paper_kind(loss) for _, _, loss in table},
        most_imbalanced="cityscapes",
    )


def match_dataset(dataset: DatasetResults) -> DatasetMatch:
    """Find the paper's data set that equals `dataset`, whatever its name in the grid.

    The classes must have the official names; for Cityscapes these are the 30 of the paper or the 34
    of its code. The number of validation images must be the paper's.
    """
    names = {name.lower().replace("_", " ") for name in dataset.classes}
    images = int(dataset.counts["images"][0]) if dataset.cells else 0
    if len(dataset.classes) == 21 and names > VOC_OBJECTS:
        candidates, classes = ["voc", "sbd"], "VOC's 21 classes"
    elif names in (CITYSCAPES, CITYSCAPES | CITYSCAPES_VOID):
        candidates, classes = ["cityscapes"], f"{len(names)} classes of Cityscapes"
    else:
        reason = f"its {len(names)} classes are those of none of the paper's data sets"
        return DatasetMatch("", reason)
    expected = {VAL_IMAGES[name]: name for name in candidates}
    if images in expected:
        return DatasetMatch(expected[images], f"{classes} and {images} validation images")
    wanted = " or ".join(map(str, expected))
    reason = f"{classes}, but {images} validation images where the paper has {wanted}"
    return DatasetMatch("", reason)


def differences(results: Results, table: Iterable[Row]) -> list[Difference]:
    """Return the differences of all scores that the paper also has, in grid order.

    CE and DL are compared with the paper's WCE and WDL, which have no class weights.
    """
    matches = {dataset.name: match_dataset(dataset).dataset for dataset in results.datasets}
    kinds = {loss["name"]: kind_of_record(loss) for loss in results.record.get("losses", [])}
    return [
        difference
        for row in table
        if matches[row.dataset]
        for difference in _row_differences(row, matches[row.dataset], kinds)
    ]


def departures(results: Results, dataset: str) -> list[str]:
    """Return the protocol settings that differ from the paper's: `epochs = 4 (the paper: 30)`."""
    own: dict[str, Any] = results.record.get("protocol", {}).get(dataset, {})
    paper = Protocol().model_dump(mode="json")
    return [
        f"{key} = {own[key]} (the paper: {paper[key]})"
        for key in COMMON_SETTINGS
        if key in own and own[key] != paper[key]
    ]


def differences_csv(found: Iterable[Difference]) -> str:
    """Return the differences as CSV in full precision, a line for each score."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["dataset", "model", "loss", "paper_dataset", "paper_loss", "score", "ours",
                     "std", "n", "paper", "difference", "doubtful", "unweighted"])  # fmt: skip
    for d in found:
        writer.writerow(
            [d.dataset, d.model, d.loss, d.paper_dataset, d.paper_loss, d.score, repr(d.ours.mean),
             repr(d.ours.std), d.ours.n, d.paper, repr(d.value), int(d.doubtful),
             int(d.unweighted)]
        )  # fmt: skip
    return file.getvalue()


def _row_differences(row: Row, dataset: str, kinds: Mapping[str, Kind]) -> Iterator[Difference]:
    paper_loss = _counterpart(row.loss, kinds.get(row.loss))
    figures = paper_table().get((dataset, row.model, paper_loss))
    if figures is None:
        return
    doubtful = DOUBTFUL.get((dataset, row.model, paper_loss), ())
    for score in PAPER_SCORES:
        yield Difference(
            dataset=row.dataset,
            model=row.model,
            loss=row.loss,
            paper_dataset=dataset,
            paper_loss=paper_loss,
            score=score,
            ours=row.scores[score],
            paper=figures[score],
            doubtful=score in doubtful,
            unweighted=paper_loss in UNWEIGHTED,
        )


def _counterpart(loss: str, kind: Kind | None) -> str:
    """Return the loss of the paper's row for `loss`, "" for none.

    It is the row of the same name if the terms agree; CE and DL have the rows WCE and WDL.
    """
    weighted = {plain: name for name, plain in UNWEIGHTED.items()}
    if loss in weighted:
        return weighted[loss]
    if loss not in {name for _, _, name in paper_table()}:
        return ""
    meant = {paper_kind(loss).terms}
    if loss in UNWEIGHTED:
        meant.add((loss,))
    return loss if kind is None or kind.terms in meant else ""
