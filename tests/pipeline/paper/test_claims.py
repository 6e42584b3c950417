"""The paper's claims: on the paper's own table, and on grids where they hold, fail, or cannot be
judged."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from jobs.losses.grammar import Knot, parse_loss
from pipeline.paper.claims import check, to_json, to_markdown
from pipeline.paper.reference import paper_evidence, paper_table
from pipeline.scores.evidence import Evidence, evidence, kind_of_spec
from pipeline.scores.results_file import DatasetResults, Results
from pipeline.scores.score_table import rows
from tests.pipeline.scores import simulated

FCN, DEEPLAB = "fcn_resnet101", "deeplabv3_resnet101"


def judged(of, paper_datasets=None):
    """The claims by key; data sets have the paper's names unless told otherwise."""
    return {c.key: c for c in check(of, paper_datasets or {data: data for data, _ in of.blocks})}


def grid(changes=(), without=(), seeds=4, jitter=0.001):
    """A grid like the paper's on VOC and Cityscapes, with CE where the paper's WCE is CE, a second
    ramp, a second ratio, and dice losses that vary; with FCN too, pre-fine has the best cal.
    `changes`: {(data set, model, loss, score): shift}."""
    changes = dict(changes)
    table = {k: dict(v) for k, v in paper_table().items() if k[0] != "sbd"}
    for dataset, model in {key[:2] for key in table}:
        table[dataset, model, "CE"] = table.pop((dataset, model, "WCE"))
        table[dataset, model, "WDLNWCE@0.2-0.8"] = table[dataset, model, "WDLNWCE"]
        table[dataset, model, "three to one"] = table[dataset, model, "DLCE"]
    table["voc", FCN, "pre-fine"]["cal"] = 0.99
    generator = np.random.default_rng(3)
    scores = {}
    for key, of in table.items():
        if key[2] in without or key in without:
            continue
        spread = jitter * (20 if key[2] == "WDL" else 1)
        scores[key] = {
            seed: {s: v + changes.get((*key, s), 0) + spread * shift for s, v in of.items()}
            for seed, shift in enumerate(generator.permutation(np.linspace(-1, 1, seeds)))
        }
    left_out = {k: ("pole",) if math.isnan(table[k]["f1"]) else () for k in scores}
    names = {loss for _, _, loss in scores}
    kinds = {n: _kind(n) for n in names}
    return Evidence(scores, left_out, kinds, "cityscapes")


def _kind(loss):
    if loss == "three to one":
        spec = parse_loss("DLCE")
        return kind_of_spec(replace(spec, schedule=(Knot(0.0, (0.75, 0.25)),)))
    return kind_of_spec(parse_loss("CE" if loss == "pre-fine" else loss))


def s_rec_of_pre_fine(of):
    """The case of VOC with FCN."""
    cases = judged(of)["pre_fine_wins"].cases
    return next(f for f in cases if f.texts[0].startswith("S_rec"))


CLAIMS = list(judged(grid()))


@pytest.mark.parametrize(
    ("claim", "verdict", "extent"),
    [
        ("recall_for_accuracy", "holds", "6 of 6 cases"),
        ("worst_calibrated", "holds in part", "4 of 6 cases"),
        ("static_compounds", "holds", "6 of 6 cases"),
        ("back_to_ce", "holds", "6 of 6 cases"),
        ("schedules_agree", "holds", "6 of 6 cases"),
        ("no_trend", "holds", "3 of 3 cases"),
        ("ramps_matter_little", "cannot be judged", "6 cannot be judged"),
        ("ratios_matter_little", "cannot be judged", "6 cannot be judged"),
        ("dice_varies_most", "cannot be judged", "6 cannot be judged"),
        ("deeplab_against_fcn", "holds", "2 of 2 cases, 1 cannot be judged"),
        ("deeplab_calibrates_worse", "holds", "3 of 3 cases"),
        ("no_class_left_out", "holds", "2 of 2 cases"),
        ("pre_fine_wins", "holds in part", "21 of 24 cases, 2 cannot be judged"),
    ],
)
def test_the_papers_own_table_supports_its_claims(claim, verdict, extent):
    found = judged(paper_evidence())[claim]
    assert (found.verdict, found.extent) == (verdict, extent)


def test_in_the_papers_table_two_rows_of_deeplab_are_calibrated_as_badly_as_fl():
    failing = [f for f in judged(paper_evidence())["worst_calibrated"].cases if not f.holds]
    assert [(f.dataset, f.models) for f in failing] == [("voc", (DEEPLAB,)), ("sbd", (DEEPLAB,))]
    assert failing[0].texts == ("Cal -0.030 at the closest pair (DLAWCE over FL), 26 of 28 pairs",)


@pytest.mark.parametrize("claim", CLAIMS)
def test_each_claim_holds_on_a_grid_like_the_papers(claim):
    lift = {("voc", DEEPLAB, loss, "cal"): 0.1 for loss in ("DLAWCE", "DLNWCE")}
    assert judged(grid(lift))[claim].verdict == "holds"


def test_the_papers_own_exceptions_to_pre_fine_are_named_with_the_claim_and_where_they_recur():
    claim = judged(paper_evidence())["pre_fine_wins"]
    assert claim.criterion.endswith(
        f"Exceptions in the paper's own table: Cal of {FCN} on voc; Cal of {FCN} on sbd; "
        f"Rec of {DEEPLAB} on sbd."
    )
    failing = [case for case in claim.cases if case.holds is False]
    assert [(f.dataset, f.models) for f in failing] == [
        ("voc", (FCN,)), ("sbd", (FCN,)), ("sbd", (DEEPLAB,))
    ]  # fmt: skip
    assert {f.texts[-1] for f in failing} == {"the paper's table has the same exception"}
    own = {("voc", DEEPLAB, "pre-fine", "acc"): -0.5}
    (of_ours,) = [f for f in judged(grid(own))["pre_fine_wins"].cases if f.holds is False]
    assert len(of_ours.texts) == 1  # the paper has no such exception


AGAINST = {
    "recall_for_accuracy": {("voc", FCN, "DLCE", "rec"): 0.2},
    "worst_calibrated": {("voc", FCN, "FL", "cal"): 0.3},
    "static_compounds": {("voc", FCN, "WDLCE", "rec"): 0.08},
    "back_to_ce": {("voc", FCN, "DLNCE", "rec"): 0.08},
    "schedules_agree": {("voc", FCN, "DLAWCE", "rec"): -0.04},
    "ramps_matter_little": {("voc", FCN, "WDLNWCE@0.2-0.8", "acc"): 0.07},
    "ratios_matter_little": {("voc", FCN, "three to one", "acc"): 0.07},
    "pre_fine_wins": {("voc", FCN, "DLNWCE", "s_rec"): 0.1},
}


@pytest.mark.parametrize("claim", AGAINST)
def test_a_claim_fails_on_the_one_data_set_and_model_where_a_cell_speaks_against_it(claim):
    found = judged(grid(AGAINST[claim]))[claim]
    assert (FCN,) in {f.models for f in found.cases if f.dataset == "voc" and f.holds is False}
    before = judged(grid())[claim].cases
    changed = [f for f, b in zip(found.cases, before, strict=True) if f.holds != b.holds]
    assert [(f.dataset, f.models) for f in changed] == [("voc", (FCN,))]


def test_accuracy_must_fall_too():
    rise = {("voc", FCN, loss, "acc"): 0.25 for loss in ("DLNWCE",)}
    found = judged(grid(rise))["recall_for_accuracy"]
    assert found.verdict == "holds in part"
    texts = next(f.texts for f in found.cases if not f.holds)
    assert texts[0].startswith("Rec +0.1")
    assert texts[1].startswith("Acc -0.0")
    assert "DLNWCE" in texts[1]


def test_a_loss_with_one_spread_larger_than_dice_refutes_that_dice_varies_most():
    steady = grid(without=("WDL",))
    assert judged(steady)["dice_varies_most"].verdict == "cannot be judged"
    wild = {k: dict(v) for k, v in grid().scores.items()}
    wild["voc", FCN, "FL"] = {s: {**of, "rec": 0.6 + 0.1 * s} for s, of in enumerate(
        wild["voc", FCN, "FL"].values())}  # fmt: skip
    found = judged(replace(grid(), scores=wild))["dice_varies_most"]
    assert [f.dataset for f in found.cases if f.holds is False] == ["voc"]


@pytest.mark.parametrize("score", ["acc", "f1", "rec"])
def test_deeplab_that_is_below_fcn_in_one_score_refutes_its_claim_on_voc(score):
    other = {("voc", DEEPLAB, loss, score): -0.4 for _, _, loss in grid().scores}
    found = judged(grid(other))["deeplab_against_fcn"]
    assert {f.dataset: f.holds for f in found.cases} == {"voc": False, "cityscapes": None}


def test_the_claim_of_voc_and_sbd_is_not_judged_on_other_data_whatever_their_name():
    found = judged(grid(), {"voc": "", "cityscapes": "sbd"})["deeplab_against_fcn"]
    assert {f.dataset: f.holds for f in found.cases} == {"voc": None, "cityscapes": True}


def test_deeplab_that_is_better_calibrated_refutes_its_claim_on_that_data_set_alone():
    other = {("voc", DEEPLAB, loss, "cal"): 0.1 for _, _, loss in grid().scores}
    found = judged(grid(other))["deeplab_calibrates_worse"]
    assert {f.dataset: f.holds for f in found.cases} == {"voc": False, "cityscapes": True}


@pytest.mark.parametrize("better", ["N", "A"])
def test_a_schedule_that_is_the_better_one_in_every_pair_of_a_data_set_is_a_trend(better):
    of_schedule = [loss for loss in SCHEDULES if better in loss]
    rise = {("voc", model, loss, "cal"): 0.2 for model in (FCN, DEEPLAB) for loss in of_schedule}
    found = judged(grid(rise))["no_trend"]
    assert {f.dataset: f.holds for f in found.cases} == {"voc": False, "cityscapes": True}
    all_but_one = {**rise, ("voc", FCN, of_schedule[0], "cal"): -0.1}
    assert judged(grid(all_but_one))["no_trend"].verdict == "holds"


def test_pairs_without_a_seed_in_common_are_no_evidence_against_a_trend():
    of_schedule = [loss for loss in SCHEDULES if "A" in loss]
    rise = {("voc", model, loss, "cal"): 0.2 for model in (FCN, DEEPLAB) for loss in of_schedule}
    unlike = {k: {s + 10 * (k[2] in of_schedule): of for s, of in v.items()}
              for k, v in grid(rise).scores.items()}  # fmt: skip
    found = judged(replace(grid(), scores=unlike))["no_trend"]
    assert {f.dataset: f.holds for f in found.cases} == {"voc": None, "cityscapes": None}
    for key in [("voc", FCN, "DLNCE"), ("voc", DEEPLAB, "DLNCE")]:
        unlike[key] = grid(rise).scores[key]
        unlike[*key[:2], "DLACE"] = grid(rise).scores[*key[:2], "DLACE"]
    found = judged(replace(grid(), scores=unlike))["no_trend"]
    assert {f.dataset: f.holds for f in found.cases} == {"voc": False, "cityscapes": None}


def test_pairs_without_a_seed_in_common_do_not_refute_that_schedules_agree():
    changed = {k: {s + 10 * (k[2] == "DLACE"): of for s, of in v.items()}
               for k, v in grid().scores.items()}  # fmt: skip
    claim = judged(replace(grid(), scores=changed))["schedules_agree"]
    assert {case.holds for case in claim.cases} == {True}
    assert all(text.endswith("3 of 3 pairs, 1 undefined") for text in claim.cases[0].texts[:2])
    none = {k: {s + 10 * ("A" in k[2]): of for s, of in v.items()} for k, v in changed.items()}
    claim = judged(replace(grid(), scores=none))["schedules_agree"]
    assert claim.verdict == "cannot be judged"
    assert claim.cases[0].texts == tuple(f"{score} is defined for no pair"
                                         for score in ("Rec", "Acc", "Cal"))  # fmt: skip


def test_a_static_mixture_with_weighted_ce_must_raise_recall_as_a_schedule_does():
    fall = {("voc", FCN, "DLWCE", "rec"): -0.2}
    (case,) = [f for f in judged(grid(fall))["recall_for_accuracy"].cases if not f.holds]
    assert "DLWCE" in case.texts[0]


@pytest.mark.parametrize(
    ("loss", "classes"), [("DLCE", ()), ("DLNWCE", ("pole",)), ("DLWCE", ("pole",))]
)
def test_one_loss_too_many_or_too_few_that_predicts_all_classes_refutes_the_claim(loss, classes):
    key = ("cityscapes", FCN, loss)
    changed = replace(grid(), never_right={**grid().never_right, key: classes})
    found = judged(changed)["no_class_left_out"]
    assert [f.holds for f in found.cases if f.models == (FCN,)] == [False]
    assert any(loss in text for f in found.cases for text in f.texts if not f.holds)


def test_a_weighted_ce_that_predicts_all_classes_is_not_in_the_papers_table():
    base = grid()
    key = ("cityscapes", FCN, "WCE")
    more = replace(
        base,
        scores={**base.scores, key: base.scores["cityscapes", FCN, "DLWCE"]},
        never_right={**base.never_right, key: ()},
        kinds={**base.kinds, "WCE": kind_of_spec(parse_loss("WCE"))},
    )
    assert judged(more)["no_class_left_out"].verdict == "holds"


SCHEDULES = ("DLNCE", "DLACE", "WDLNCE", "WDLACE", "DLNWCE", "DLAWCE", "WDLNWCE", "WDLAWCE")
MISSING = {
    "recall_for_accuracy": (
        *("DLWCE", "WDLWCE", "DLNWCE", "DLAWCE", "WDLNWCE", "WDLAWCE", "WDLNWCE@0.2-0.8"),
    ),
    "static_compounds": ("DLCE", "WDLCE", "three to one"),
    "worst_calibrated": ("CEMP",),
    "back_to_ce": ("CE",),
    "schedules_agree": ("DLACE", "WDLACE", "DLAWCE", "WDLAWCE"),
    "no_trend": SCHEDULES,
    "ramps_matter_little": ("WDLNWCE@0.2-0.8",),
    "ratios_matter_little": ("three to one",),
    "dice_varies_most": ("WDL",),
    "deeplab_against_fcn": tuple(key for key in grid().scores if key[1] == FCN),
    "deeplab_calibrates_worse": tuple(key for key in grid().scores if key[1] == FCN),
    "no_class_left_out": ("DLNWCE", "DLAWCE", "WDLNWCE", "WDLAWCE", "WDLNWCE@0.2-0.8", "DLWCE"),
    "pre_fine_wins": ("pre-fine",),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_without_its_cells_a_claim_cannot_be_said_and_names_what_is_missing(claim):
    found = judged(grid(without=MISSING[claim]))[claim]
    assert found.verdict == "cannot be judged"
    assert all(text.startswith("missing: ") for f in found.cases for text in f.texts)
    assert found.cases[0].dataset in found.cases[0].texts[0]


def test_one_seed_cannot_say_what_varies():
    (text,) = judged(grid(seeds=1))["dice_varies_most"].cases[0].texts
    assert text == "missing: a second seed of every loss"


def test_where_scheduling_changes_nothing_there_is_no_scale_to_call_a_difference_small():
    flat = {}
    for key, of in grid().scores.items():
        flat[key] = {seed: {**one, "rec": 0.5, "acc": 0.5} for seed, one in of.items()}
    found = judged(replace(grid(), scores=flat))
    assert found["recall_for_accuracy"].verdict == "does not hold"
    assert found["schedules_agree"].verdict == "cannot be judged"
    assert (
        "schedules towards WCE change Rec by +0.000 only"
        in found["schedules_agree"].cases[0].texts[0]
    )


def test_a_difference_that_the_papers_two_digits_would_not_show_is_none():
    top = max(of[0]["s_rec"] for key, of in grid(jitter=0).scores.items()
              if key[:2] == ("voc", FCN) and key[2] != "pre-fine")  # fmt: skip
    own = grid(jitter=0).scores["voc", FCN, "pre-fine"][0]["s_rec"]
    for lead, holds in ((0.004, False), (0.006, True)):
        nearer = grid({("voc", FCN, "pre-fine", "s_rec"): top + lead - own}, jitter=0)
        case = s_rec_of_pre_fine(nearer)
        assert (case.dataset, case.models, case.holds) == ("voc", (FCN,), holds)


def test_a_loss_whose_s_rec_no_seed_defines_is_left_out_and_counted():
    changed = grid({("voc", FCN, "CEMP", "s_rec"): math.nan})
    case = s_rec_of_pre_fine(changed)
    assert case.holds
    assert case.texts[0].endswith("17 of 17 pairs, 1 undefined")


def test_how_much_comes_with_the_spread_over_seeds_of_the_paired_difference():
    case = s_rec_of_pre_fine(grid())
    own = grid().scores["voc", FCN, "pre-fine"]
    closest = grid().scores["voc", FCN, "WDLNWCE"]
    apart = [own[seed]["s_rec"] - closest[seed]["s_rec"] for seed in range(4)]
    expected = f"S_rec {np.mean(apart):+.3f} ± {np.std(apart, ddof=1):.3f} (4 of 4 seeds)"
    assert case.texts[0].startswith(f"{expected} at the closest pair (pre-fine over WDLNWCE")


def test_machines_read_verdicts_and_the_names_of_the_cells_compared():
    read = {claim["claim"]: claim for claim in json.loads(to_json(list(judged(grid()).values())))}
    assert read["pre_fine_wins"]["verdict"] == "holds"
    cells = read["pre_fine_wins"]["findings"][0]["cells"]
    assert f"voc/{FCN}/pre-fine" in cells
    assert len(cells) == 19
    both = read["deeplab_against_fcn"]["findings"][0]["cells"]
    assert {cell.split("/")[1] for cell in both} == {FCN, DEEPLAB}


def test_people_read_a_sentence_a_verdict_and_escaped_names():
    text = to_markdown(list(judged(grid(without=("CEMP",))).values()))
    assert "## FL and CEMP have the worst calibration.\n\n**cannot be judged**" in text
    assert r"missing: voc/fcn\_resnet101/CEMP" in text


def results(confusions, losses, train=(100, 10)):
    """Results of two data sets with two classes: by loss a confusion matrix for each seed."""
    datasets = []
    for name, pixels in (("even", (50, 50)), ("uneven", train)):
        counts = [simulated.Counts.zeros(2, 10).as_arrays() for _ in losses for _ in confusions[0]]
        cells = []
        for index, (loss, seed) in enumerate((o, s) for o in losses for s in (5, 2)):
            matrix = np.array(confusions[losses.index(loss)][(5, 2).index(seed)], np.int64)
            counts[index].update(confusion=matrix, pixels=np.array(matrix.sum()))
            cells.append(simulated.cell_record(name, FCN, loss, seed))
        arrays = {key: np.stack([one[key] for one in counts]) for key in simulated.NAMES}
        both = np.array(pixels)
        datasets.append(DatasetResults(name, ["road", "pole"], both, both, cells, arrays))
    return Results("g", {"losses": [simulated.loss_record(loss) for loss in losses]}, datasets)


def test_counts_become_evidence_by_seed_with_the_classes_that_one_seed_leaves_out():
    made = results([[[[8, 2], [1, 3]], [[9, 1], [3, 1]]], [[[7, 3], [4, 0]], [[9, 1], [3, 1]]]],
                   ["DLNWCE", "CE"])  # fmt: skip
    seen = evidence(made, rows(made))
    assert seen.by_seed(("even", FCN, "DLNWCE"), "acc") == {5: 11 / 14, 2: 10 / 14}
    assert seen.by_seed(("even", FCN, "CE"), "rec") == {5: 0.35, 2: 0.575}
    assert seen.never_right["even", FCN, "DLNWCE"] == ()
    assert seen.never_right["even", FCN, "CE"] == ("pole",)  # predicted by one seed, never right
    assert seen.most_imbalanced == "uneven"
    claim = judged(seen)["no_class_left_out"]
    assert [(f.dataset, f.holds) for f in claim.cases] == [("uneven", True)]
    assert judged(seen)["recall_for_accuracy"].verdict == "does not hold"


def test_a_class_without_training_pixels_does_not_make_data_imbalanced():
    made = results([[[[8, 2], [1, 3]]] * 2, [[[7, 3], [4, 0]]] * 2], ["DLNWCE", "CE"], (90, 0))
    assert evidence(made, rows(made)).most_imbalanced == "even"
