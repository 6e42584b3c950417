"""A bundle on two nodes is struck by what no rank is told of, and ends with the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.cluster import faults
from tests.cluster.bundle_runs import TOTAL, BundleRun
from tests.cluster.faults import Victim
from tests.cluster.slurm_cluster import until
from tests.jobs.small_runs import assert_all_same

WRITER = 0  # the rank that writes checkpoints
OTHER = 1  # one on the other node

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def struck_down(new_bundle) -> dict[Callable, BundleRun]:
    """One bundle after the other, each in its first start, ended by a fault that has healed since.
    All are struck before one goes on, since `grid` takes a job for dead only half a minute after
    its last heartbeat."""
    kinds = (
        (faults.link_cut, WRITER),
        (faults.disk_full, WRITER),
        (faults.newest_checkpoint_cut_short, OTHER),
    )
    bundles = {}
    for fault, rank in kinds:
        bundle = bundles[fault] = new_bundle(exclude="n[3-4]")
        if fault is faults.disk_full:
            faults.give_disk(bundle.run, bundle.key, bundle.cluster)
        victim = running(bundle)
        if fault is faults.link_cut:
            with faults.link_cut_for_a_while(victim, rank):
                pass
            assert bundle.times_started == 1, "it went on by itself"
        elif fault is faults.newest_checkpoint_cut_short:
            # asked before the loop goes on
            until(lambda: len(bundle.steps_saved) > 1, bundle.log)  # noqa: B023
        with fault(victim, rank):
            pass
    return bundles


def running(bundle: BundleRun) -> Victim:
    """The bundle on the cluster, after its first checkpoint."""
    victim = Victim(bundle.cluster, bundle.submit(), bundle.run, bundle.key)
    bundle.wait_for_checkpoint()
    return victim


def test_a_link_between_nodes_that_is_cut(struck_down, expected):
    bundle = struck_down[faults.link_cut]
    found = bundle.finish(bundle.submit_again())
    bundle.assert_resumed_once(most_redone=bundle.most_redone())
    assert bundle.stopped_after == [], "the ranks could not agree to stop"
    assert_all_same(found, expected)


def test_a_disk_that_is_full_while_a_checkpoint_is_written(struck_down, expected):
    bundle = struck_down[faults.disk_full]
    folder = bundle.run.checkpoints(bundle.key)
    reason = "No space left on device; free space or fix permissions, run again"
    assert re.search(rf"^error: cannot write {folder}/step-\d+-g1: {reason}$", bundle.log(), re.M)
    found = bundle.finish(bundle.submit_again())
    bundle.assert_resumed_once(most_redone=bundle.most_redone())
    assert_all_same(found, expected)


def test_a_rank_that_is_killed_and_a_newest_checkpoint_that_is_cut_short(struck_down, expected):
    bundle = struck_down[faults.newest_checkpoint_cut_short]
    assert "task 1: Killed" in bundle.log()
    newest = bundle.steps_saved[-1]
    found = bundle.finish(bundle.submit_again())
    assert "is damaged (its checksum differs); passed over" in bundle.log()
    assert bundle.resumed_at[-1] < newest
    # back to the checkpoint before the newest one, hence two intervals
    bundle.assert_resumed_once(most_redone=2 * bundle.most_redone())
    assert_all_same(found, expected)


def test_a_node_that_is_cut_off_and_comes_back_while_its_ranks_still_run(new_bundle, expected):
    bundle = new_bundle()
    victim = running(bundle)
    with faults.node_isolated(victim, WRITER) as stale:
        assert [process.rank for process in stale] == [WRITER]
    found = bundle.finish(victim.job)
    (first, *later), resumed = bundle.starts, bundle.resumed_at
    assert resumed[0] == 0 < min(resumed[1:])
    assert first == list(range(len(first)))
    assert len(first) - resumed[1] <= bundle.most_redone()
    # back on the network, the old srun may tell its step to end, and the new one goes by the same
    # number: that hands itself back once more, and nothing is done twice
    assert [step for steps in later for step in steps] == list(range(resumed[1], TOTAL))
    assert_all_same(found, expected)
