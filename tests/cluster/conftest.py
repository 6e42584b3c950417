"""One cluster for the whole test run, and the undisturbed run that others are compared with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from tests.cluster.bundle_runs import LIMITS_REACHED, BundleRun, pack_streets, undisturbed
from tests.cluster.slurm_cluster import Cluster, NoCluster

NUM_NODES = 4


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes. Where there can be none the tests are skipped, but fail where
    `LOSSGRID_REQUIRE_CLUSTER` is set, as .ci/run does."""
    try:
        started = Cluster(NUM_NODES)
    except NoCluster as error:
        if os.environ.get("LOSSGRID_REQUIRE_CLUSTER"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    yield started
    started.end()


@pytest.fixture(scope="session")
def streets_on_cluster(cluster) -> str:
    """The folder of a small packed data set that all nodes see."""
    return pack_streets(cluster.runs / "streets")


@pytest.fixture(scope="session")
def expected(cluster, streets_on_cluster) -> dict:
    """The results of the bundle, undisturbed, from as many ranks on this machine alone."""
    return undisturbed(cluster, cluster.runs / "undisturbed", streets_on_cluster)


@pytest.fixture(scope="session")
def new_bundle(cluster, streets_on_cluster) -> Iterator[Callable[..., BundleRun]]:
    """A function that makes a run of the bundle, with what else `BundleRun` takes. Jobs that a test
    left are cancelled."""
    numbers = count()

    def make(**options: Any) -> BundleRun:
        folder = cluster.runs / f"bundle{next(numbers)}"
        return BundleRun(cluster, folder, streets_on_cluster, **options)

    yield make
    cluster.command("scancel", "--user=root")


@pytest.fixture
def bundle(new_bundle) -> BundleRun:
    """On half of the cluster, so that whoever wants its nodes disturbs nobody else's."""
    return new_bundle(exclude="n[3-4]")


@pytest.fixture(scope="session")
def time_limited(new_bundle) -> tuple[BundleRun, str]:
    """The bundle with a time limit that it cannot keep in its first starts, submitted, and its job.
    Slurm looks at limits twice a minute, so that the notice comes after 18 to 48 seconds; the long
    lead is for busy machines, on which ranks take their time to start."""
    run = new_bundle(
        pause=4.0, slow_starts=LIMITS_REACHED, exclude="n[1-2]", minutes=2, lead_seconds=72
    )
    return run, run.submit()


@pytest.fixture(scope="session", autouse=True)
def _what_takes_longest_goes_first(request: pytest.FixtureRequest) -> None:
    """It waits most of the time, and the other tests run meanwhile."""
    if any("time_limited" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("time_limited")
