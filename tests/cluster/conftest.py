"""One cluster for each process that runs tests, and the undisturbed run that others must equal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from tests.cluster.bundle_runs import BundleRun, bundle_grid, pack_streets, undisturbed
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
    return undisturbed(bundle_grid(cluster.runs / "undisturbed", streets_on_cluster))


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
