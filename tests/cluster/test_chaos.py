"""A short run of `tests.cluster.chaos`, and faults that its judgement must find."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch

from tests.cluster.chaos import ChaosOptions, conclude, differing, draw, run_chaos
from tests.cluster.chaos_record import Outcome, Strike, failures, judge, judge_all, table
from tests.cluster.faults import KINDS
from tests.cluster.slow_training import Begun

# faults from which two nodes recover, because other tests use the other nodes
ON_TWO_NODES = ("rank killed", "TERM to a rank")
STRIKE = Strike("rank killed", "bundle", generation=1, saved=4, most_redone=3)


def record(*starts: range, bundle: str = "bundle") -> list[Begun]:
    """Return a record with a step each second, and ten seconds between two starts."""
    begun, now = [], 0.0
    for generation, steps in enumerate(starts, 1):
        for step in steps:
            begun.append(Begun(bundle, generation, step, now := now + 1.0))
        now += 9.0
    return begun


@pytest.mark.slow
def test_two_faults_leave_every_bit_as_it_is(cluster, capsys):
    profile = {"exclude": "n[3-4]", "cpus_per_task": 4}
    plan = ChaosOptions(2, seed=1, kinds=ON_TWO_NODES, num_bundles=1, profile=profile)
    code = run_chaos(cluster, cluster.runs / "chaos", plan)
    said = capsys.readouterr().out
    assert code == 0, said
    for kind in ON_TWO_NODES:
        assert re.search(rf"^\| {kind} \| [1-9]\d* \| [1-9]\d* \|", said, re.M), said
    assert re.search(r"^\| all \| \d+ \| 2 \|", said, re.M), said
    assert re.search(r"^\d times 3 cells, all bit for bit as undisturbed", said, re.M), said


def test_what_was_lost_is_counted_in_steps_and_seconds():
    outcome = judge(STRIKE, record(range(6), range(4, 10)))
    assert outcome == Outcome("rank killed", unsaved=2, redone=2, seconds=12.0)


def test_a_stop_that_saved_counts_by_the_steps_that_it_handed_over():
    outcome = judge(STRIKE, record(range(6), range(6, 10)))
    assert outcome == Outcome("rank killed", unsaved=2, redone=0, seconds=10.0)


@pytest.mark.parametrize(
    ("strike", "starts", "why"),
    [
        (replace(STRIKE, saved=0), (range(3), range(10)), "before the first checkpoint"),
        (STRIKE, (range(10),), "no training was interrupted"),
        (STRIKE, (range(4), range(4, 10)), "nothing was unsaved"),
        (replace(STRIKE, bundle="another"), (range(6), range(4, 10)), "no training was"),
    ],
)
def test_what_disturbed_nothing_does_not_count(strike, starts, why):
    outcome = judge(strike, record(*starts))
    assert why in outcome.uncounted
    assert failures([outcome], 1, (), ()) == ["0 faults were counted, and 1 were wanted"]


def test_a_start_counts_once():
    first, second = judge_all([STRIKE, STRIKE], record(range(6), range(4, 10)))
    assert first.uncounted == ""
    assert second.uncounted == "that start had been struck before"


@pytest.mark.parametrize(
    ("second", "harm"),
    [
        (range(2, 10), "4 steps were done twice, and 3 would have been allowed"),
        (range(10), "it began anew, and had a checkpoint of step 4"),
        (range(8, 10), "steps 6 to 7 were never done"),
    ],
)
def test_what_must_not_happen_is_named(second, harm):
    outcome = judge(STRIKE, record(range(6), second))
    assert failures([outcome], 1, (), ()) == [f"rank killed: {harm}"]


def test_no_fault_no_cell_and_a_bit_that_differs_are_each_a_failure(capsys):
    counted, plan = Outcome("rank killed", unsaved=1), ChaosOptions(faults=1, seed=0)
    assert conclude([counted], plan, 1, (), ()) == 0
    assert "error" not in capsys.readouterr().out
    for outcomes, missing, different, line in (
        ([], (), (), "0 faults were counted, and 1 were wanted"),
        ([counted], ("a cell",), (), "1 cells are missing: a cell"),
        ([counted], (), ("a cell",), "1 cells differ: a cell"),
    ):
        assert conclude(outcomes, plan, 1, missing, different) == 1
        assert f"error: {line}\n" in capsys.readouterr().out
    assert conclude([], ChaosOptions(faults=0, seed=0), 1, (), ()) == 1, (
        "no fault at all proves nothing"
    )


def test_one_bit_makes_a_cell_differ():
    ones = torch.ones(3)
    almost = torch.nextafter(ones, torch.tensor([1.0, 1.0, 2.0]))
    same, other = ({"w": ones}, {"pixels": ones.numpy()}), ({"w": almost}, {"pixels": ones.numpy()})
    assert list(differing({"a": same, "b": other}, {"a": same, "b": same})) == ["b"]


def test_every_kind_is_drawn_as_often_as_any_other():
    kinds = tuple(KINDS)
    drawn, again, other = (draw(random.Random(seed), kinds, 50) for seed in (3, 3, 4))
    assert drawn == again != other
    assert len(drawn) == 50
    assert {drawn.count(kind) for kind in kinds} == {4, 5}


def test_the_table_has_a_row_for_each_kind_and_one_for_all():
    outcomes = [
        Outcome("preempted", unsaved=3, seconds=9.6),
        Outcome("rank killed", unsaved=3, redone=3, seconds=40.0),
        Outcome("rank killed", unsaved=1, redone=1, seconds=30.0),
        Outcome("rank killed", uncounted="nothing was unsaved"),
    ]
    assert list(table(outcomes))[2:] == [
        "| preempted | 1 | 1 | 0 | 0 | 10 | 10 |",
        "| rank killed | 3 | 2 | 4 | 3 | 35 | 40 |",
        "| all | 4 | 3 | 4 | 3 | 30 | 40 |",
    ]
