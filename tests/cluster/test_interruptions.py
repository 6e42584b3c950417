"""A bundle on two nodes is stopped in every way a cluster has, and ends with the same bits."""

from __future__ import annotations

import signal

import pytest

from tests.cluster.bundle_runs import LIMITS_REACHED, TOTAL, WORLD_SIZE, BundleRun
from tests.cluster.slurm_cluster import until
from tests.jobs.small_runs import assert_all_same


@pytest.fixture(scope="module")
def time_limited(new_bundle) -> tuple[BundleRun, str]:
    """The bundle with a time limit that it cannot keep in its first starts, submitted, and its job.
    Slurm looks at limits twice a minute, so that the notice comes after 18 to 48 seconds; the long
    lead is for busy machines, on which ranks take their time to start."""
    run = new_bundle(
        pause=4.0, slow_starts=LIMITS_REACHED, exclude="n[1-2]", minutes=2, lead_seconds=72
    )
    return run, run.submit()


@pytest.fixture(scope="module", autouse=True)
def _the_time_limit_passes_meanwhile(request: pytest.FixtureRequest) -> None:
    """Submit its bundle before the first test, if its test is to run."""
    if any("time_limited" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("time_limited")


def assert_no_step_was_redone(bundle):
    """As after a stop that was announced: it saved the step it had reached."""
    starts = bundle.starts
    assert [step for steps in starts for step in steps] == list(range(TOTAL))
    assert bundle.stopped_after == bundle.resumed_at[1:]
    # a start after a stop in the evaluation has no step left to begin
    assert [steps[0] for steps in starts] == [s for s in bundle.resumed_at if s < TOTAL]
    assert bundle.resumed_at[0] == 0
    assert all(step > 0 for step in bundle.resumed_at[1:])


def test_preempted_by_an_urgent_job(cluster, bundle, expected):
    job = bundle.submit()
    bundle.wait_for_checkpoint()
    urgent = cluster.urgent(cluster.nodes_of(job))
    cluster.wait_for_state(urgent, "COMPLETED")
    found = bundle.finish(job)
    assert cluster.job(job)["Restarts"] == "1"
    assert len(bundle.starts) == 2
    assert "stopped by SIGTERM" in bundle.log()
    assert_no_step_was_redone(bundle)
    assert_all_same(found, expected)


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_in_one_step(cluster, new_bundle, expected):
    bundle = new_bundle(workers=1, exclude="n[3-4]")
    job = bundle.submit()
    bundle.wait_for_checkpoint()
    processes = [p for node in cluster.nodes_of(job) for p in cluster.processes(job, node)]
    ranks = {p.rank: p for p in processes if p.rank is not None}
    assert sorted(ranks) == [0, 1]
    assert len([p for p in processes if p.is_loader]) == WORLD_SIZE
    ranks[1].send(signal.SIGUSR2)
    until(lambda: cluster.job(job)["Restarts"] == "1", bundle.log)
    assert "stopped by another rank's signal after step" in bundle.log()
    # ranks, their loaders, and what started them
    until(lambda: not any(p.is_alive for p in processes), f"all of {processes} ended")
    found = bundle.finish(job)
    assert len(bundle.starts) == 2
    assert_no_step_was_redone(bundle)
    assert_all_same(found, expected)


@pytest.mark.slow
def test_a_node_that_fails_costs_one_checkpoint_interval_at_most(cluster, new_bundle, expected):
    bundle = new_bundle()
    job = bundle.submit()
    bundle.wait_for_checkpoint()
    node = cluster.nodes_of(job)[-1]
    cluster.fail(node)
    try:
        until(lambda: cluster.job(job)["Restarts"] == "1", lambda: str(cluster.job(job)))
        found = bundle.finish(job)
    finally:
        cluster.revive(node)
    bundle.assert_resumed_once(most_redone=bundle.most_redone())
    assert_all_same(found, expected)


@pytest.mark.slow
def test_a_time_limit_shorter_than_the_run(cluster, time_limited, expected):
    bundle, job = time_limited
    until(lambda: bundle.times_started > LIMITS_REACHED, bundle.log, seconds=600)
    found = bundle.finish(job)
    assert len(bundle.starts) > LIMITS_REACHED
    assert bundle.log().count("stopped by SIGUSR2") == bundle.times_started - 1
    assert_no_step_was_redone(bundle)
    assert_all_same(found, expected)
