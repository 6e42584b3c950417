"""Paired comparisons of losses over few seeds."""

import csv
import io
import math

import numpy as np
import pytest

from pipeline.scores.evidence import Evidence
from pipeline.scores.paired_comparison import (
    across,
    comparisons,
    groups,
    paired,
    shown,
    summary,
    to_csv,
)


def evidence(values, score="s_rec"):
    """Evidence from {(data set, model, loss): [one value a seed]}; other scores are 0.5."""
    others = dict.fromkeys(("s_rec", "rec", "cal", "acc"), 0.5)
    scores = {
        key: {seed: {**others, score: value} for seed, value in enumerate(of)}
        for key, of in values.items()
    }
    return Evidence(scores, dict.fromkeys(values, ()), {}, "")


def test_seeds_are_paired_by_their_number_and_not_by_their_order():
    one = {3: 0.5, 1: 0.9, 7: 0.4}
    other = {1: 0.7, 3: 0.4, 5: 0.0}
    pair = paired(one, other)  # 0.1 at seed 3, 0.2 at seed 1
    assert (pair.mean, pair.n) == (pytest.approx(0.15), 2)
    assert pair.std == pytest.approx(np.std([0.1, 0.2], ddof=1))


def test_a_difference_that_is_not_defined_is_no_pair():
    pair = paired({0: math.nan, 1: 0.5}, {0: 0.1, 1: 0.25})
    assert (pair.mean, pair.n, pair.positive) == (0.25, 1, 1)
    assert math.isnan(pair.std)
    assert shown(paired({0: math.nan}, {0: 0.1})) == "nan"


@pytest.mark.parametrize("positive", range(7))
@pytest.mark.parametrize("negative", range(7))
def test_the_sign_test_is_that_of_scipy(positive, negative):
    stats = pytest.importorskip("scipy.stats")
    pair = summary([0.1] * positive + [-0.1] * negative + [0.0])
    signs = positive + negative
    expected = stats.binomtest(positive, signs).pvalue if signs else 1.0
    assert pair.sign_p == pytest.approx(expected)


def test_four_seeds_show_no_p_since_none_could_be_small():
    assert summary([0.1] * 4).smallest_p == 0.125
    assert "p =" not in shown(summary([0.1] * 4))
    assert shown(summary([0.1, 0.2, 0.3, -0.2])) == "+0.100 ± 0.216, 3 of 4"
    assert shown(summary([0.1] * 6)).endswith("6 of 6, p = 0.031")


def test_losses_stand_against_ce_where_the_grid_has_it():
    (group,) = groups(evidence({("d", "m", "DL"): [0.5, 0.6], ("d", "m", "CE"): [0.4, 0.3]}))
    assert (group.against, group.chosen) == ("CE", False)
    assert group.lines["DL"][0].mean == pytest.approx(0.2)
    assert group.lines["DL"][0].positive == 2


def test_without_ce_they_stand_against_the_best_which_is_said():
    values = {("d", "m", "pre-fine"): [0.9], ("d", "m", "DL"): [0.5], ("d", "m", "FL"): [0.6]}
    (group,) = groups(evidence(values))
    assert (group.against, group.chosen) == ("FL", True)
    assert set(group.lines) == {"pre-fine", "DL"}


def test_over_data_sets_and_models_each_mean_counts_once():
    values = {}
    for index, where in enumerate([("a", "m"), ("a", "n"), ("b", "m")]):
        values[*where, "CE"] = [0.3, 0.3]
        values[*where, "DL"] = [0.3 + 0.1 * index, 0.4 + 0.1 * index]
    every = across(groups(evidence(values)))
    assert every.lines["DL"][0].mean == pytest.approx(np.mean([0.05, 0.15, 0.25]))
    assert every.lines["DL"][0].n == 3  # not 6


def test_groups_against_different_losses_are_not_averaged():
    values = {("a", "m", "CE"): [0.3], ("a", "m", "DL"): [0.4],
              ("b", "m", "FL"): [0.3], ("b", "m", "DL"): [0.4]}  # fmt: skip
    assert across(groups(evidence(values))) is None


def test_the_csv_has_every_pair_of_every_block_and_of_all_blocks():
    values = {(d, "m", loss): [0.1, 0.3] for d in "ab" for loss in ("CE", "DL", "FL")}
    values["b", "m", "FL"] = [0.5, 0.2]
    lines = list(csv.DictReader(io.StringIO(to_csv(comparisons(evidence(values))))))
    assert len(lines) == 4 * 3 * (2 + 1)  # scores, pairs, blocks and all of them
    (line,) = (
        of
        for of in lines
        if (of["dataset"], of["loss"], of["against"], of["score"]) == ("b", "FL", "DL", "s_rec")
    )
    assert float(line["difference"]) == pytest.approx(0.15)
    assert (line["positive"], line["negative"], line["n"]) == ("1", "1", "2")
    assert float(line["smallest_p"]) == 0.5
    assert [of["n"] for of in lines if not of["dataset"]] == ["2"] * 12
