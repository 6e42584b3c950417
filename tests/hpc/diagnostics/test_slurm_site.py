"""Slurm's notation of times, amounts, GPUs and MPI types is parsed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from hpc.diagnostics.site_checks import queue_limits
from hpc.diagnostics.slurm_site import SlurmSite, amounts, minutes_of, num_gpus
from hpc.scheduler import slurm_cli
from hpc.scheduler.cluster_profile import ClusterProfile


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("1-00:00:00", 1440),
        ("2-12", 3600),
        ("1-02:30", 1590),
        ("08:00:00", 480),
        ("30:00", 30),
        ("90", 90),
        ("00:00:30", 0.5),
        ("UNLIMITED", math.inf),
        ("INFINITE", math.inf),
        ("", math.inf),
    ],
)
def test_a_time_limit(limit, minutes):
    assert minutes_of(limit) == minutes


@pytest.mark.parametrize(
    ("gres", "kind", "number"),
    [
        ("gpu:4", "", 4),
        ("gpu", "", 1),
        ("gpu:v100", "v100", 1),
        ("gpu:v100:4(S:0-1)", "", 4),
        ("gpu:v100:4(S:0,2)", "v100", 4),
        ("gpu:v100:4", "a100", 0),
        ("gpu:a100:2(S:0),gpu:v100:3(S:1)", "", 5),
        ("gpu:a100:2(S:0),gpu:v100:3(S:1)", "v100", 3),
        ("craynetwork:4,gpu:nvidia_a100_80gb_pcie:2", "nvidia_a100_80gb_pcie", 2),
        ("gpu:1g.10gb:7", "", 7),  # MIG
        ("gpu:3g.40gb+me:1,gpu:1g.10gb:4(S:0)", "1g.10gb", 4),
        ("shard:8", "", 0),
        ("(null)", "", 0),
    ],
)
def test_the_gpus_of_a_node(gres, kind, number):
    assert num_gpus(gres, kind) == number


def test_amounts_of_a_limit():
    assert amounts("cpu=64,gres/gpu=8,mem=512G,node=4") == {"cpu": 64, "gres/gpu": 8, "node": 4}
    assert amounts("") == {}


@pytest.mark.parametrize(
    ("said", "types"),
    [
        (
            "MPI types are...\n\tpmix\n\tnone\n\tpmi2\nversions available: pmix_v4,pmix_v5\n",
            {"pmix", "none", "pmi2", "pmix_v4", "pmix_v5"},
        ),
        ("srun: MPI types are...\nsrun: none\nsrun: openmpi\n", {"none", "openmpi"}),
    ],
    ids=["since 22.05", "before"],
)
def test_the_types_of_mpi(monkeypatch, said, types):
    monkeypatch.setattr(slurm_cli, "ask", lambda *_words: said)
    assert SlurmSite().mpi_types == types


def test_an_array_may_have_as_many_jobs_as_max_array_size_says():
    partitions = {"p": {"PartitionName": "p", "Default": "YES"}}
    config = {"MaxArraySize": "1001"}  # indices 0 to 1000
    site = SimpleNamespace(partitions=partitions, config=config, associations=[], qos={})
    assert queue_limits(ClusterProfile(), site).startswith("arrays of up to 1001 jobs; ")
