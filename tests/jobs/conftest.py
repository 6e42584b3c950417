"""Fixtures of the tests of jobs: one thread, one rank, and a small packed data set."""

from __future__ import annotations

import pytest
import torch

from data_prep.pack import pack
from data_prep.settings import parse_dataset
from hpc.distributed.launcher import RankEnv
from hpc.distributed.process_group import process_group
from jobs import train
from tests.jobs.small_runs import grid_of, results, task_of


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few numbers gain nothing from threads, and wait for them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def alone(tmp_path):
    """The process group of a job with one rank."""
    env = RankEnv("single", 0, 1, 0, node="here", job_id="", start_id="")
    with process_group(env, tmp_path / "rendezvous") as group:
        yield group


@pytest.fixture(scope="session")
def streets(tmp_path_factory):
    """The manifest of eleven drawn pictures of 40 x 56 to train on, and three to validate on."""
    folder = tmp_path_factory.mktemp("streets")
    table = {"source": "synthetic", "shards": str(folder), "train": 11, "val": 3, "size": [40, 56]}
    return pack("streets", parse_dataset("streets", table, "grid.toml"), processes=1)


@pytest.fixture(scope="session")
def undisturbed(streets, tmp_path_factory):
    """The results of a job that trains CE and DLNWCE on the streets and that nothing interrupts."""
    grid = grid_of(tmp_path_factory.mktemp("undisturbed"), streets.folder, "CE", "DLNWCE")
    assert train.main([str(task_of(grid))]) == 0
    return results(grid.run)
