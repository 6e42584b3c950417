"""The paper's Table 1 (Taubert et al. 2021), and how results of one's own compare with it."""

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

# The published code drops the class weights of a loss that has no second term.
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
# Raw ids 4 to 33; the published code has 0 to 3 too.
CITYSCAPES = frozenset(
    {"static", "dynamic", "ground", "road", "sidewalk", "parking", "rail track", "building",
     "wall", "fence", "guard rail", "bridge", "tunnel", "pole", "polegroup", "traffic light",
     "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus",
     "caravan", "trailer", "train", "motorcycle", "bicycle"}
)  # fmt: skip
CITYSCAPES_VOID = frozenset({"unlabeled", "ego vehicle", "rectification border", "out of roi"})
VAL_IMAGES = {"voc": 1449, "sbd": 2857, "cityscapes": 500}

# What of a protocol is the same on all of the paper's data sets.
COMMON_SETTINGS = ("epochs", "batch_size", "learning_rate", "decay", "momentum", "weight_decay",
                   "train", "backbone_batchnorm", "naive_ramp", "alternating_ramp",
                   "bins")  # fmt: skip


@dataclass(frozen=True)
class Match:
    """Which of the paper's data sets one is ("" for none), and what speaks for or against it."""

    dataset: str
    reason: str


@dataclass(frozen=True)
class Difference:
    """One score of a cell's row beside the paper's. `ours` is over seeds. `doubtful`: the paper's
    figure contradicts its own row. `unweighted`: the paper's row of that name is the loss without
    class weights, so that `loss` and `paper_loss` may differ in name."""

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
        """Ours minus the paper's; nan if one of them is."""
        return self.ours.mean - self.paper


@cache
def paper_table() -> Mapping[Key, Mapping[str, float]]:
    """The six scores of the paper's 100 rows by (data set, model, loss), in its order."""
    text = (files(__package__) / "table1.csv").read_text(encoding="utf-8")
    return {
        (line["dataset"], line["model"], line["loss"]): {s: float(line[s]) for s in PAPER_SCORES}
        for line in csv.DictReader(io.StringIO(text))
    }


def paper_kind(loss: str) -> Kind:
    """What a loss of the paper's table really was: see `UNWEIGHTED`; pre-fine is CE."""
    return kind_of_spec(parse_loss("CE" if loss == PRE_FINE else UNWEIGHTED.get(loss, loss)))


def paper_evidence() -> Evidence:
    """Return the paper's table as claims see it: one seed, the mean of its four. F1 is nan there
    where a class is never right; the table does not say which."""
    table = paper_table()
    return Evidence(
        scores={key: {0: row} for key, row in table.items()},
        never_right={
            key: ("one or more classes",) if math.isnan(row["f1"]) else ()
            for key, row in table.items()
        },
        kinds={loss: paper_kind(loss) for _, _, loss in table},
        most_imbalanced="cityscapes",
        of_the_paper={dataset: dataset for dataset, _, _ in table},
    )


def same_dataset(dataset: DatasetResults) -> Match:
    """Which of the paper's data sets this is, whatever its name in the grid: its classes have the
    official names (of Cityscapes the 30 of the paper or the 34 of its code), and it was validated
    on as many images as the paper's."""
    names = {name.lower().replace("_", " ") for name in dataset.classes}
    images = int(dataset.counts["images"][0]) if dataset.cells else 0
    if len(dataset.classes) == 21 and names > VOC_OBJECTS:
        candidates, classes = ["voc", "sbd"], "VOC's 21 classes"
    elif names in (CITYSCAPES, CITYSCAPES | CITYSCAPES_VOID):
        candidates, classes = ["cityscapes"], f"{len(names)} classes of Cityscapes"
    else:
        return Match("", f"its {len(names)} classes are those of none of the paper's data sets")
    expected = {VAL_IMAGES[name]: name for name in candidates}
    if images in expected:
        return Match(expected[images], f"{classes} and {images} validation images")
    wanted = " or ".join(map(str, expected))
    return Match("", f"{classes}, but {images} validation images where the paper has {wanted}")


def differences(results: Results, table: Iterable[Row]) -> list[Difference]:
    """Every score that the paper has too, where the data set is the same, in the order of the
    grid. CE and DL stand beside the paper's WCE and WDL, which are what these names mean."""
    matches = {dataset.name: same_dataset(dataset).dataset for dataset in results.datasets}
    kinds = {loss["name"]: kind_of_record(loss) for loss in results.record.get("losses", [])}
    return [
        difference
        for row in table
        if matches[row.dataset]
        for difference in _row_differences(row, matches[row.dataset], kinds)
    ]


def departures(results: Results, dataset: str) -> list[str]:
    """Settings of a data set's protocol that are not the paper's: `epochs = 4 (the paper: 30)`."""
    own: dict[str, Any] = results.record.get("protocol", {}).get(dataset, {})
    paper = Protocol().model_dump(mode="json")
    return [
        f"{key} = {own[key]} (the paper: {paper[key]})"
        for key in COMMON_SETTINGS
        if key in own and own[key] != paper[key]
    ]


def differences_csv(found: Iterable[Difference]) -> str:
    """Every difference in full precision, a line a score."""
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
    """The paper's row to hold a loss against, "" for none: that of its name unless it is made of
    other terms, and for CE and DL those that are really theirs."""
    weighted = {plain: name for name, plain in UNWEIGHTED.items()}
    if loss in weighted:
        return weighted[loss]
    if loss not in {name for _, _, name in paper_table()}:
        return ""
    meant = {paper_kind(loss).terms}
    if loss in UNWEIGHTED:
        meant.add((loss,))
    return loss if kind is None or kind.terms in meant else ""
