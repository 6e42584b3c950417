"""Differences of a grid's results to the paper's Table 1."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.metrics.counts import NAMES, Counts
from pipeline.paper.reference import (
    CITYSCAPES,
    CITYSCAPES_VOID,
    DOUBTFUL,
    UNWEIGHTED,
    VOC_OBJECTS,
    departures,
    differences,
    differences_csv,
    match_dataset,
    paper_table,
)
from pipeline.scores.results_file import DatasetResults, Results
from pipeline.scores.score_table import rows
from tests.pipeline.scores import simulated

VOC = ["background", *sorted(VOC_OBJECTS)]
FCN = "fcn_resnet101"
SHARED = Path(__file__).parents[4] / "shared" / "paper" / "table1.csv"


def harmonic(a, b):
    return 2 * a * b / (a + b)


def dataset(name="pascal", classes=VOC, images=1449, losses=("DLCE",), model=FCN, seeds=2):
    """A data set on which 5 of 6 pixels are right: one of each class, and one of the first taken
    for the last."""
    num_classes = len(classes)
    confusion = np.eye(num_classes, dtype=np.int64) * 5
    confusion[0, -1] = num_classes
    one = Counts.zeros(num_classes, 10).as_arrays()
    one.update(confusion=confusion, pixels=np.array(confusion.sum()), images=np.array(images))
    cells = [simulated.cell_record(name, model, o, s) for o in losses for s in range(seeds)]
    counts = {key: np.stack([one[key]] * len(cells)) for key in NAMES}
    pixels = np.full(num_classes, 5)
    return DatasetResults(name, list(classes), pixels, pixels, cells, counts)


def grid(*datasets, **record):
    losses = {cell["loss"] for of in datasets for cell in of.cells}
    record.setdefault("losses", [simulated.loss_record(loss) for loss in sorted(losses)])
    return Results("g", record, list(datasets))


def found(*datasets, **record):
    made = grid(*datasets, **record)
    return differences(made, rows(made))


def test_the_table_has_the_papers_grid():
    table = paper_table()
    assert len(table) == 100
    assert len({model for _, model, _ in table}) == 2
    per_dataset = {d: len({k[2] for k in table if k[0] == d}) for d in ("voc", "sbd", "cityscapes")}
    assert per_dataset == {"voc": 17, "sbd": 17, "cityscapes": 16}  # no pre-fine on Cityscapes
    assert table["sbd", "deeplabv3_resnet101", "WDLNCE"]["s_rec"] == 0.88


@pytest.mark.shared
def test_the_shipped_table_is_the_one_that_was_handed_over():
    if not SHARED.exists():
        pytest.skip("no shared folder beside the repository")
    shipped = Path(__file__).parents[3] / "pipeline" / "paper" / "table1.csv"
    assert shipped.read_bytes() == SHARED.read_bytes()


def test_the_doubtful_scores_are_those_that_break_their_own_harmonic_means():
    half = 0.005  # every figure is rounded to two digits
    breaking = {}
    for key, row in paper_table().items():
        for score, part in (("s_acc", "acc"), ("s_rec", "rec")):
            low, high = (harmonic(row["cal"] + d, row[part] + d) for d in (-half, half))
            if not low - half <= row[score] <= high + half:
                breaking.setdefault(key, []).append(score)
    assert {key: tuple(of) for key, of in breaking.items()} == DOUBTFUL
    assert len(DOUBTFUL) == 5


def test_the_papers_wce_has_the_recall_of_losses_without_class_weights():
    for (data, model, loss), row in paper_table().items():
        if loss == "WCE":
            near, far = (paper_table()[data, model, of]["rec"] for of in ("DLCE", "DLWCE"))
            assert abs(row["rec"] - near) < abs(row["rec"] - far)


@pytest.mark.parametrize(
    ("classes", "images", "expected"),
    [
        (VOC, 1449, "voc"),
        (VOC, 2857, "sbd"),
        (["__background__", *VOC[:0:-1]], 1449, "voc"),  # order and background's name are free
        (sorted(CITYSCAPES), 500, "cityscapes"),
        ([c.replace(" ", "_") for c in sorted(CITYSCAPES | CITYSCAPES_VOID)], 500, "cityscapes"),
        (sorted(CITYSCAPES)[:19], 500, ""),  # recall over other classes is another score
        (VOC, 346, ""),
        (VOC[1:], 1449, ""),
        ([f"class {i}" for i in range(21)], 1449, ""),
        (VOC, 500, ""),
    ],
)
def test_a_data_set_is_the_papers_by_its_classes_and_images_whatever_its_name(
    classes, images, expected
):
    assert match_dataset(dataset("voc", classes, images)).dataset == expected


def test_what_is_not_the_papers_data_is_said():
    reason = match_dataset(dataset(images=346)).reason
    assert reason == "VOC's 21 classes, but 346 validation images where the paper has 1449 or 2857"
    assert "21 classes" in match_dataset(dataset(classes=[f"c{i}" for i in range(21)])).reason


def test_the_thirty_classes_of_cityscapes_and_its_four_kinds_of_void_are_all_its_raw_ids():
    assert (len(CITYSCAPES), len(CITYSCAPES_VOID), len(VOC_OBJECTS)) == (30, 4, 20)


def test_a_difference_is_ours_minus_the_papers_score_by_score():
    by_score = {one.score: one for one in found(dataset())}
    assert list(by_score) == ["acc", "f1", "rec", "cal", "s_acc", "s_rec"]
    acc = by_score["acc"]
    assert acc.value == pytest.approx(105 / 126 - 0.89)
    assert (acc.dataset, acc.paper_dataset, acc.paper, acc.ours.n) == ("pascal", "voc", 0.89, 2)
    assert not any(one.doubtful or one.unweighted for one in by_score.values())


def test_the_doubtful_figures_alone_are_flagged():
    flagged = {(o.loss, o.score) for o in found(dataset(losses=("FL", "CEMP", "DLCE")))
               if o.doubtful}  # fmt: skip
    assert flagged == {("FL", "s_rec"), ("CEMP", "s_rec")}


def test_weighted_ce_and_dice_are_flagged_and_the_plain_ones_stand_beside_them():
    beside = {(one.loss, one.paper_loss, one.unweighted)
              for one in found(dataset(losses=("WCE", "WDL", "CE", "DL", "DLCE")))}  # fmt: skip
    assert beside == {
        ("WCE", "WCE", True), ("WDL", "WDL", True), ("CE", "WCE", True), ("DL", "WDL", True),
        ("DLCE", "DLCE", False),
    }  # fmt: skip
    assert UNWEIGHTED == {"WCE": "CE", "WDL": "DL"}


def test_a_loss_that_only_bears_a_name_of_the_papers_is_not_compared():
    other = {**simulated.loss_record("DLNCE"), "name": "DLCE", "terms": ["FL", "CE"]}
    assert found(dataset(), losses=[other]) == []


def test_a_wce_without_weights_is_the_papers():
    plain = {**simulated.loss_record("CE"), "name": "WCE"}
    assert {one.paper_loss for one in found(dataset(losses=("WCE",)), losses=[plain])} == {"WCE"}


def test_models_losses_and_data_that_the_paper_has_not_are_not_compared():
    assert found(dataset(model="fcn_resnet50")) == []
    assert found(dataset(losses=("FLNCE", "WDLNWCE@0.2-0.8"))) == []
    assert found(dataset(images=10)) == []


def test_settings_that_are_not_the_papers_are_named():
    protocol = {"pascal": {"epochs": 4, "batch_size": 12, "naive_ramp": [0.2, 0.9], "crop": [9, 9]}}
    assert departures(grid(dataset(), protocol=protocol), "pascal") == [
        "epochs = 4 (the paper: 30)",
        "naive_ramp = [0.2, 0.9] (the paper: [0.3, 0.9])",
    ]


def test_the_csv_has_both_figures_and_what_is_doubtful():
    made = dataset(losses=("FL",))
    lines = list(csv.DictReader(io.StringIO(differences_csv(found(made)))))
    s_rec = lines[-1]
    assert (s_rec["score"], s_rec["paper"], s_rec["doubtful"]) == ("s_rec", "0.69", "1")
    assert float(s_rec["difference"]) == float(s_rec["ours"]) - 0.69


def test_a_data_set_of_which_nothing_is_done_is_none_of_the_papers():
    data = dataset()
    empty = {name: array[:0] for name, array in data.counts.items()}
    assert match_dataset(replace(data, cells=[], counts=empty)).dataset == ""
