"""Same cell, same bits: a cell does not know what else its job trains."""

import shutil

import pytest
import torch

from data_prep.pack import pack
from hpc.storage.atomic import read_json
from jobs import pretrain, train
from jobs.spec.task import Task, write_task
from jobs.training import cell_trainer
from tests.jobs.small_runs import assert_same, results
from tests.pipeline.grids import small_grid

MODEL = "fcn_mobilenet_v3_large"


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A packed data set and its pre-trained backbone."""
    grid = small_grid(
        tmp_path_factory.mktemp("bits"),
        ('weights = "none"', 'weights = "pretrain"\nlearning_rate = 0.05'),
        more="[protocol.pretrain]\nepochs = 1\nbatch_size = 2\n",
    )
    pack("streets", grid.datasets["streets"], processes=1)
    task = task_of(grid, grid.run.root, grid.cells[:1], "pretrain")
    assert pretrain.main([str(write_task(task))]) == 0
    return grid


def task_of(grid, run, cells, kind="bundle"):
    settings = grid.datasets["streets"]
    return Task(
        kind=kind, name="task", run=str(run), data=settings.shards, origin=settings.origin(),
        cells=tuple(cells),
    )  # fmt: skip


def trained(grid, run, cells):
    """Head weights and counts by cell name, of one job that trains `cells` in this order."""
    shutil.copytree(grid.run.root / "backbones", run / "backbones")
    task = task_of(grid, run, cells)
    assert train.main([str(write_task(task))]) == 0
    return results(task.paths)


@pytest.fixture(scope="module")
def bundle(grid, tmp_path_factory):
    cells = [cell for cell in grid.cells if cell.seed == 0]
    return trained(grid, tmp_path_factory.mktemp("bundle"), cells)


@pytest.mark.parametrize("model", [MODEL, "deeplabv3_mobilenet_v3_large"])
def test_alone_and_in_a_bundle(grid, bundle, tmp_path, model):
    (cell,) = (c for c in grid.cells if c.name == f"streets/{model}/DLNWCE/0")
    alone = trained(grid, tmp_path, [cell])
    assert_same(alone[cell.name], bundle[cell.name])


@pytest.mark.parametrize("workers", [0, 2])  # the bundle has one
def test_with_any_number_of_loader_workers(grid, bundle, tmp_path, workers):
    (cell,) = (c for c in grid.cells if c.name == f"streets/{MODEL}/CE/0")
    changed = cell.protocol.model_copy(update={"workers": workers})
    cell = cell.model_copy(update={"protocol": changed})
    assert_same(trained(grid, tmp_path, [cell])[cell.name], bundle[cell.name])


def test_in_another_order_and_without_one_of_the_cells(grid, bundle, tmp_path):
    cells = [cell for cell in grid.cells if cell.seed == 0][:0:-1]
    for name, result in trained(grid, tmp_path, cells).items():
        assert_same(result, bundle[name])


def test_another_seed_gives_other_bits(grid, bundle, tmp_path):
    (cell,) = (c for c in grid.cells if c.name == f"streets/{MODEL}/CE/1")
    weights, _ = trained(grid, tmp_path, [cell])[cell.name]
    other, _ = bundle[f"streets/{MODEL}/CE/0"]
    assert not all(torch.equal(weights[key], other[key]) for key in weights)


def test_a_loss_that_is_not_finite_stops_its_cell_alone(grid, bundle, tmp_path, monkeypatch):
    cells = [cell for cell in grid.cells if cell.seed == 0 and cell.model == MODEL]
    honest = cell_trainer.combined_loss

    def broken(logits, target, loss, position, *rest):
        value = honest(logits, target, loss, position, *rest)
        return value * float("nan") if loss.name == "CE" and position > 0.5 else value

    monkeypatch.setattr(cell_trainer, "combined_loss", broken)
    rest = trained(grid, tmp_path, cells)
    (stopped,) = (cell for cell in cells if cell.loss.name == "CE")
    assert {cell.name for cell in cells} - {stopped.name} == set(rest)
    for name, result in rest.items():
        assert_same(result, bundle[name])
    record = read_json(task_of(grid, tmp_path, cells).paths.failure(stopped.signature))
    assert "nan at step 4 of 6" in record["reason"]


def test_the_backbone_is_not_touched_by_the_cells_that_share_it(grid, bundle, tmp_path):
    cell = grid.cells[0]
    path = grid.run.backbone(cell.backbone_key)
    state = torch.load(path, weights_only=True)
    assert any(tensor.abs().max() > 0.1 for tensor in state.values())
    head = bundle[f"streets/{MODEL}/CE/0"][0]
    assert not any(name.startswith("backbone.") for name in head)
