"""A grid file becomes cells, bundles and jobs: the same ones whenever it is read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from hpc.cli import UserError
from jobs.losses.grammar import Knot, Term
from jobs.spec.cell import bundles
from pipeline.config import grid_file as grid_files
from pipeline.config.grid_file import read_grid
from pipeline.planning.plan import Plan, make_plan
from tests.pipeline.grids import grid_file, small_grid

REPOSITORY = Path(__file__).parents[3]
ALL_GRIDS = sorted(REPOSITORY.glob("configs/*.toml"))
PRETRAIN = ('weights = "none"', 'weights = "pretrain"')
TWO_DATASETS = """
[dataset.fields]
source = "synthetic"
seed = 5
"""
FIELDS = """
[protocol.per_dataset.fields]
batch_size = 3
naive_ramp = [0.1, 0.2]
pretrain = {epochs = 8}
"""


def plan(grid, cells=None, steps=None, backbones=()) -> Plan:
    return make_plan(grid, grid.cells if cells is None else cells, steps or {}, backbones, {})


def names(cells) -> list[str]:
    return [cell.name for cell in cells]


def test_cells_come_in_the_order_of_the_file(tmp_path):
    grid = small_grid(tmp_path, ("[dataset.streets]", f"{TWO_DATASETS}[dataset.streets]"))
    assert names(grid.cells) == [
        f"{dataset}/{model}/{loss}/{seed}"
        for dataset in ("fields", "streets")
        for model in ("fcn_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
        for loss in ("CE", "DLNWCE")
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("path", ALL_GRIDS, ids=lambda path: path.stem)
def test_every_grid_that_comes_with_lossgrid_can_be_planned(path):
    assert len(ALL_GRIDS) >= 2
    grid = read_grid(path)
    work = plan(grid)
    planned = [cell for task in work.bundles for cell in task.cells]
    assert sorted(names(planned)) == sorted(names(grid.cells))
    assert grid.cluster.local_jobs >= 1


def test_a_bundle_is_a_data_set_a_backbone_and_a_seed(tmp_path):
    changes = (
        ("[dataset.streets]", f"{TWO_DATASETS}[dataset.streets]"),
        ('"deeplabv3_mobilenet_v3_large"', '"deeplabv3_mobilenet_v3_large", "fcn_resnet50"'),
    )
    grid = small_grid(tmp_path, *changes)
    together = bundles(grid.cells)
    assert len(together) == 2 * 2 * 2
    for cells in together.values():
        assert len({(cell.dataset, cell.seed) for cell in cells}) == 1
        assert len(cells) in (2 * 2, 1 * 2)  # both heads of one backbone, or the one of the other


def test_a_job_trains_a_bundle(tmp_path):
    grid = small_grid(tmp_path)
    work = plan(grid)
    assert work.pretrain == ()
    assert [names(task.cells) for task in work.bundles] == [
        names(cell for cell in grid.cells if cell.seed == seed) for seed in (0, 1)
    ]
    for task in work.bundles:
        assert (task.kind, task.run) == ("bundle", str(tmp_path / "run"))
        assert task.data == str(tmp_path / "streets")


@pytest.mark.parametrize(("size", "jobs"), [(1, [1] * 8), (3, [3, 1, 3, 1]), (9, [4, 4])])
def test_a_job_takes_no_more_cells_than_the_profile_says(tmp_path, size, jobs):
    grid = small_grid(tmp_path, more=f"cells_per_job = {size}\n")
    tasks = plan(grid).bundles
    assert [len(task.cells) for task in tasks] == jobs
    assert names(c for task in tasks for c in task.cells if c.seed == 0) == names(
        cell for cell in grid.cells if cell.seed == 0
    )
    assert len({task.name for task in tasks}) == len(tasks)


def test_whole_networks_are_trained_one_a_job(tmp_path):
    grid = small_grid(tmp_path, ("threads = 1", 'threads = 1\ntrain = "all"'))
    assert [len(task.cells) for task in plan(grid).bundles] == [1] * 8


def test_cells_that_are_further_go_on_from_there_in_a_job_of_their_own(tmp_path):
    """A new loss, or one that is retried, costs the others no progress."""
    grid = small_grid(tmp_path)
    seed0 = [cell for cell in grid.cells if cell.seed == 0]
    steps = {seed0[0].signature: 120, seed0[2].signature: 120, seed0[3].signature: 60}
    tasks = plan(grid, seed0, steps).bundles
    assert [names(task.cells) for task in tasks] == [
        names([seed0[0], seed0[2]]),
        names([seed0[3]]),
        names([seed0[1]]),
    ]


def test_only_what_is_wanted_is_planned(tmp_path):
    grid = small_grid(tmp_path)
    wanted = [grid.cells[5], grid.cells[0]]
    assert [names(task.cells) for task in plan(grid, wanted).bundles] == [[c.name] for c in wanted]
    assert plan(grid, []) == Plan((), ())


def test_planning_twice_is_planning_once(tmp_path):
    path = grid_file(tmp_path, PRETRAIN)
    first, second = plan(read_grid(path)), plan(read_grid(path))
    assert first == second
    further = plan(read_grid(path), steps={read_grid(path).cells[0].signature: 5})
    assert {task.name for task in further.bundles} != {task.name for task in first.bundles}


def test_a_backbone_is_pre_trained_once_for_all_seeds_and_heads(tmp_path):
    changes = (PRETRAIN, ('"deeplabv3_mobilenet_v3_large"', '"deeplabv3_resnet50", "fcn_resnet50"'))
    grid = small_grid(tmp_path, *changes)
    work = plan(grid)
    assert len(work.bundles) == 4
    assert [(task.kind, len(task.cells)) for task in work.pretrain] == [("pretrain", 1)] * 2
    assert {task.name for task in work.pretrain} == {
        f"pretrain-{cell.backbone_key}" for cell in grid.cells
    }


def test_a_backbone_that_is_there_is_not_trained_again(tmp_path):
    grid = small_grid(tmp_path, PRETRAIN)
    key = grid.cells[0].backbone_key
    work = plan(grid, backbones={key})
    assert work.pretrain == ()
    assert len(work.bundles) == 2
    assert len(plan(grid, grid.cells[:1], backbones={"another"}).pretrain) == 1


def test_a_data_set_may_change_the_protocol_for_itself(tmp_path):
    grid = small_grid(
        tmp_path,
        ("[dataset.streets]", f"{TWO_DATASETS}[dataset.streets]"),
        ("[protocol]", "[protocol.pretrain]\nepochs = 7\nlearning_rate = 0.5\n\n[protocol]"),
        ("[cluster]", f"{FIELDS}\n[cluster]"),
    )
    streets, fields = grid.protocols["streets"], grid.protocols["fields"]
    assert (streets.batch_size, fields.batch_size) == (2, 3)
    assert (streets.epochs, fields.epochs) == (2, 2)  # what it does not name stays
    assert (streets.pretrain.epochs, fields.pretrain.epochs) == (7, 8)
    assert streets.pretrain.learning_rate == fields.pretrain.learning_rate == 0.5
    assert {cell.dataset: cell.protocol for cell in grid.cells} == dict(grid.protocols)
    starts = {
        cell.dataset: cell.loss.schedule[1].at for cell in grid.cells if "N" in cell.loss.name
    }
    assert starts == {"fields": 0.1, "streets": 0.3}


@pytest.mark.parametrize("path", ALL_GRIDS, ids=lambda path: path.stem)
def test_a_cell_is_the_same_whenever_its_grid_is_read(path):
    first, second = ([cell.signature for cell in read_grid(path).cells] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(first)


def test_a_cell_is_the_same_wherever_it_is_trained(tmp_path):
    here = small_grid(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    there = small_grid(
        elsewhere,
        ("threads = 1", "threads = 5\nworkers = 0\ncheckpoint_minutes = 1"),
        ('kind = "local"', "tasks_per_node = 4\ncells_per_job = 1"),
        ('name = "small"', 'name = "other"'),
        ("train = 6", 'train = 6\nroot = "/else/where"\nshard_mb = 3'),
    )
    assert [c.signature for c in there.cells] == [c.signature for c in here.cells]
    assert there.cells[0].name == here.cells[0].name


@pytest.mark.parametrize(
    "change",
    [
        ("epochs = 2", "epochs = 3"),
        ("train = 6", "train = 7"),
        ("\nsize = [32, 40]", "\nsize = [32, 41]"),
        ("[dataset.streets]", "[dataset.roads]"),
    ],
)
def test_what_changes_the_result_makes_other_cells(tmp_path, change):
    before = {cell.signature for cell in small_grid(tmp_path).cells}
    assert before.isdisjoint(cell.signature for cell in small_grid(tmp_path, change).cells)


def test_another_loss_or_seed_leaves_the_cells_there_were(tmp_path):
    before = {cell.signature for cell in small_grid(tmp_path).cells}
    more = small_grid(tmp_path, ('"DLNWCE"]', '"FL", "DLNWCE"]'), ("[0, 1]", "[2, 1, 0]"))
    assert before < {cell.signature for cell in more.cells}
    assert len(more.cells) == 18


def test_a_loss_can_be_composed_of_terms_and_a_schedule(tmp_path):
    grid = small_grid(
        tmp_path,
        more="""
[[loss]]
name = "three-way"
terms = ["WDL", "FL", "WCE"]
schedule = [
    {at = 0.0, weights = [1, 0, 0]},
    {at = 0.5, weights = [0, 1.5, 0]},
    {at = 0.9, weights = [0, 0, 1], ramp = "cosine"},
]

[[loss]]
name = "even"
terms = ["DL", "CE"]
""",
    )
    *_, three, even = grid.losses
    assert [loss.name for loss in grid.losses] == ["CE", "DLNWCE", "three-way", "even"]
    assert three.terms == (Term("DL", True), Term("FL", False), Term("CE", True))
    assert three.schedule == (
        Knot(0.0, (1.0, 0.0, 0.0)),
        Knot(0.5, (0.0, 1.5, 0.0)),
        Knot(0.9, (0.0, 0.0, 1.0), "cosine"),
    )
    assert even.schedule == (Knot(0.0, (0.5, 0.5)),)
    assert len(bundles(grid.cells)) == 2  # they train beside the others
    assert len(grid.cells) == 16


def test_a_grid_may_have_composed_losses_only(tmp_path):
    more = '\n[[loss]]\nname = "mine"\nterms = ["CE"]\n'
    grid = small_grid(tmp_path, ('losses = ["CE", "DLNWCE"]\n', ""), more=more)
    assert [loss.name for loss in grid.losses] == ["mine"]


def folder_of(tmp_path, name: str) -> Path:
    changes = ('"small"', json.dumps(name)), (f'run_dir = "{tmp_path}/run"\n', "")
    return small_grid(tmp_path, *changes).run.root


@pytest.mark.parametrize("name", ["small", "Straße", "V-2.1_b", "x" * 60])
def test_a_run_has_a_folder_of_its_grids_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert folder_of(tmp_path, name) == tmp_path / "runs" / name


def test_grids_whose_names_are_no_folders_names_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a/b", "a b", "a-b", "a$b", "..", ".", ".a", "a", "x" * 300, "x" * 301, "$(touch x)"]
    folders = [folder_of(tmp_path, name) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert folder.parent == tmp_path / "runs"
        assert re.fullmatch(r"[\w+-][\w.+-]{0,60}", folder.name)
        folder.mkdir(parents=True)


def test_relative_paths_start_at_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deep = tmp_path / "grids"
    deep.mkdir()
    changes = ((f'"{deep}/run"', '"my-run"'), (f'shards = "{deep}/streets"\n', ""))
    grid = small_grid(deep, *changes)
    assert grid.run.root == tmp_path / "my-run"
    shards = Path(grid.datasets["streets"].shards)
    assert shards.parent == tmp_path / "data" and shards.name.startswith("streets-")


def test_a_profile_may_lie_beside_the_grid_and_the_runs_copy_of_it_still_be_read(tmp_path):
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters/site.toml").write_text("cells_per_job = 2\ngpus_per_node = 3\n")
    no_table = ('\n[cluster]\nkind = "local"\n', "")
    path = grid_file(tmp_path, no_table, top='cluster = "site"\n')
    assert read_grid(path).cluster.gpus_per_node == 3
    assert len(plan(read_grid(path)).bundles) == 4
    kept = tmp_path / "run/grid.toml"
    kept.parent.mkdir()
    shutil.copy(path, kept)
    copy = read_grid(kept)  # as reduce and report do, on a node
    assert copy.cells == read_grid(path).cells
    with pytest.raises(UserError, match=r"there is no cluster profile 'site'"):
        _ = copy.cluster


def test_a_profile_that_is_asked_for_replaces_the_grids_own(tmp_path):
    (tmp_path / "other.toml").write_text("local_jobs = 7\n")
    path = grid_file(tmp_path)
    assert read_grid(path).cluster.kind == "local"
    assert read_grid(path, cluster=str(tmp_path / "other.toml")).cluster.local_jobs == 7


def test_schedules_are_tried_with_each_ramp(tmp_path):
    grid = small_grid(tmp_path, top="ramps = [[0.2, 0.5], [0.3, 0.9]]\n")
    assert [loss.name for loss in grid.losses] == ["CE", "DLNWCE@0.2-0.5", "DLNWCE@0.3-0.9"]
    places = [[knot.at for knot in loss.schedule] for loss in grid.losses]
    assert places == [[0.0], [0.0, 0.2, 0.5], [0.0, 0.3, 0.9]]
    own = ('"DLNWCE"]', '"DLNWCE@0.1-0.4"]')
    grid = small_grid(tmp_path, own, top="ramps = [[0.2, 0.5], [0.3, 0.9]]\n")
    assert [loss.name for loss in grid.losses] == ["CE", "DLNWCE@0.1-0.4"]


@pytest.mark.parametrize("ramp", ["[0.5, 0.5]", "[0.9, 0.2]", "[0, 0.5]"])
def test_a_ramp_that_does_not_rise_is_refused(tmp_path, ramp):
    with pytest.raises(UserError, match=r"ramps: .* must be \[s, e\] with 0 < s < e"):
        small_grid(tmp_path, top=f"ramps = [{ramp}]\n")


def test_the_environment_names_a_grid_file():
    assert grid_files._default_config({}) is None
    assert grid_files._default_config({"LOSSGRID_CONFIG": ""}) is None
    assert (
        grid_files._default_config({"LOSSGRID_CONFIG": "~/a.toml"}) == Path("~/a.toml").expanduser()
    )
