"""On several ranks too a cell gets the same bits alone and in a bundle: every head has its own DDP,
and all ranks train the heads in the same order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_prep.shards.manifest import Manifest
from hpc.distributed.preemption import stop_request
from jobs.losses.grammar import parse_loss
from jobs.spec.cell import Cell
from jobs.spec.counts_file import read_counts, read_index
from jobs.spec.protocol import Protocol
from jobs.spec.task import Task, read_task, write_task
from jobs.train import train_bundle
from tests.jobs.ranks import on_ranks

FCN, DEEPLAB = "fcn_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"
# of three images a batch, two ranks have one and two
PROTOCOL = Protocol(
    epochs=1, batch_size=3, learning_rate=0.1, resize=(32, 40), crop=(32, 32), eval_size=0,
    weights="none", threads=1, workers=0,
)  # fmt: skip
CELLS = [
    Cell(dataset="streets", data="0123456789abcdef", model=model, loss=parse_loss(loss), seed=0,
         protocol=PROTOCOL)
    for model, loss in ((FCN, "WCE"), (DEEPLAB, "WDLWCE"), (FCN, "WDLNWCE"))
]  # fmt: skip


def train_task(group, path):
    with stop_request() as stop:
        train_bundle(read_task(path), group, stop)


def trained(folder, data, cells):
    """Head weights and counts by cell name, of one job that trains `cells` on two ranks."""
    run, ranks = folder / "run", folder / "ranks"
    ranks.mkdir()
    origin = Manifest.load(data).origin
    task = Task(
        kind="bundle", name="task", run=str(run), data=str(data), origin=origin, cells=tuple(cells)
    )
    on_ranks(2, ranks, train_task, write_task(task))
    index = read_index(task.paths.counts_of("task", 1).with_suffix(".json"))
    (provenance,) = index.record["provenance"]
    assert provenance["world_size"] == 2
    arrays = read_counts(index)
    return {
        cell["name"]: (
            torch.load(task.paths.head(cell["signature"]), weights_only=True)["weights"],
            {name: array[position] for name, array in arrays.items()},
        )
        for position, cell in enumerate(map(index.of_cell, index.signatures))
    }


@pytest.fixture(scope="module")
def bundle(streets, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("bundle"), streets.folder, CELLS)


@pytest.mark.parametrize("cell", CELLS[1:], ids=lambda cell: f"{cell.model}-{cell.loss.name}")
def test_a_cell_on_two_ranks_is_the_same_alone_and_in_a_bundle(bundle, streets, tmp_path, cell):
    assert len(bundle) == len(CELLS)
    alone = trained(tmp_path, streets.folder, [cell])
    (weights, counts), (in_bundle, counted) = alone[cell.name], bundle[cell.name]
    assert weights.keys() == in_bundle.keys()
    assert [key for key in weights if not torch.equal(weights[key], in_bundle[key])] == []
    assert [key for key in counts if not np.array_equal(counts[key], counted[key])] == []
    assert counts["images"] == 3
