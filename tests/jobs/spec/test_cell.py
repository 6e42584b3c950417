"""The identity of a cell depends on settings that change results; bundles share a backbone."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from data_prep.settings import parse_dataset
from data_prep.weights import FILES, PUBLISHED
from jobs.losses.grammar import Knot, LossSpec, Term, parse_loss
from jobs.models.registry import MODELS
from jobs.pretrain import pretraining_cell
from jobs.spec.cell import Cell, bundles
from jobs.spec.protocol import Pretrain, Protocol
from jobs.spec.run_paths import RunPaths
from tests.jobs.cells import a_cell

# every setting, with a value that is not its default
CHANGES_THE_RESULT = {
    "epochs": 31,
    "batch_size": 13,
    "learning_rate": 2e-3,
    "decay": "polynomial",
    "decay_power": 0.8,
    "momentum": 0.8,
    "weight_decay": 2e-4,
    "resize": (260, 1041),
    "long_side": "truncate",
    "crop": (480, 481),
    "flip": 0.4,
    "eval_size": 521,
    "weights": "coco",
    "train": "all",
    "backbone_batchnorm": "train",
    "batchnorm_momentum": 0.2,
    "precision": "mixed",
    "naive_ramp": (0.3, 0.8),
    "alternating_ramp": (0.5, 0.8),
    "bins": 11,
    "counting": "reference",
}
CHANGES_THE_SPEED = {
    "threads": 3,
    "workers": 0,
    "deterministic": True,
    "checkpoint_minutes": 1.0,
    "profile": True,
}
PRETRAINING = {"epochs": 21, "batch_size": 9, "learning_rate": 0.03, "seed": 1}
PRETRAINING_SPEED = {"threads": 5}

FCN, DEEPLAB = "fcn_resnet101", "deeplabv3_resnet101"


def paper_cell(model=FCN, **changes):
    return a_cell(**{"model": model, "weights": "imagenet", **changes})


def pretrained_cell(**changes):
    return paper_cell(weights="pretrain", pretrain=Pretrain(**changes))


# --- signature --------------------------------------------------------------------------------


def test_every_setting_is_known_to_change_the_result_or_only_the_speed():
    both = {**CHANGES_THE_RESULT, **CHANGES_THE_SPEED, "pretrain": None}
    assert both.keys() == Protocol.model_fields.keys()
    assert {**PRETRAINING, **PRETRAINING_SPEED}.keys() == Pretrain.model_fields.keys()
    defaults = Protocol().model_dump()
    assert all(defaults[name] != value for name, value in both.items())


@pytest.mark.parametrize("setting", CHANGES_THE_RESULT)
def test_a_setting_that_changes_the_result_makes_another_cell(setting):
    changed = paper_cell(**{setting: CHANGES_THE_RESULT[setting]})
    assert changed.signature != paper_cell().signature
    assert changed.bundle_key != paper_cell().bundle_key


@pytest.mark.parametrize("setting", CHANGES_THE_SPEED)
def test_a_setting_that_changes_the_speed_does_not(setting):
    changed = paper_cell(**{setting: CHANGES_THE_SPEED[setting]})
    assert changed.signature == paper_cell().signature
    assert changed.bundle_key == paper_cell().bundle_key


def test_all_results_are_told_apart():
    cells = [paper_cell(**{name: value}) for name, value in CHANGES_THE_RESULT.items()]
    assert len({cell.signature for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    "changes",
    [{"dataset": "voc"}, {"data": "f" * 16}, {"model": DEEPLAB}, {"seed": 1},
     {"loss": parse_loss("WDL")}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_data_set_model_loss_and_seed_make_another_cell(changes):
    assert paper_cell().model_copy(update=changes).signature != paper_cell().signature


DL, WDL, CE = Term("DL", False), Term("DL", True), Term("CE", False)
HALF, LATE = Knot(0.0, (0.5, 0.5)), Knot(0.5, (0.0, 1.0))


@pytest.mark.parametrize(
    ("terms", "schedule"),
    [
        ((WDL, CE), (HALF, LATE)),
        ((CE, DL), (HALF, LATE)),
        ((DL, CE), (HALF,)),
        ((DL, CE), (HALF, replace(LATE, weights=(0.1, 0.9)))),
        ((DL, CE), (HALF, replace(LATE, at=0.6))),
        ((DL, CE), (HALF, replace(LATE, ramp="cosine"))),
    ],
    ids=["weighted", "order", "knots", "weights", "place", "ramp"],
)
def test_a_loss_of_ones_own_is_what_it_does_not_what_it_is_called(terms, schedule):
    mine = LossSpec("mine", (DL, CE), (HALF, LATE))
    other = LossSpec("mine", terms, schedule)
    cells = [paper_cell().model_copy(update={"loss": loss}) for loss in (mine, other)]
    assert cells[0].signature != cells[1].signature


def test_a_changed_copy_of_a_cell_is_another_cell():
    """Also of one whose keys were asked for before, and are kept."""
    cell = pretrained_cell()
    known = cell.signature, cell.bundle_key, cell.backbone_key
    changed = cell.model_copy(update={"data": "f" * 16})
    assert changed == pretrained_cell().model_copy(update={"data": "f" * 16})
    assert not {changed.signature, changed.bundle_key, changed.backbone_key}.intersection(known)
    assert (cell.signature, cell.bundle_key, cell.backbone_key) == known
    same = cell.model_copy()
    assert same == cell and same.signature == cell.signature


def test_where_the_data_set_lies_is_not_part_of_a_cell():
    def identity(**table):
        table = {"source": "synthetic", "shards": "/data/here", **table}
        return parse_dataset("streets", table, "grid.toml").identity()

    assert identity() == identity(shards="/elsewhere") == identity(root="/r", shard_mb=1)
    assert identity() != identity(train=201)
    assert identity() != identity(seed=1)


@pytest.mark.parametrize("setting", PRETRAINING)
def test_the_settings_of_pretraining_count_where_it_is_used(setting):
    changed = {setting: PRETRAINING[setting]}
    assert pretrained_cell(**changed).signature != pretrained_cell().signature
    assert pretrained_cell(**changed).backbone_key != pretrained_cell().backbone_key
    unused = paper_cell(pretrain=Pretrain(**changed))
    assert unused.signature == paper_cell().signature


def test_the_threads_of_pretraining_never_count():
    changed = pretrained_cell(**PRETRAINING_SPEED)
    assert changed.signature == pretrained_cell().signature
    assert changed.backbone_key == pretrained_cell().backbone_key


@pytest.mark.parametrize("loss", ["WCE", "DLCE", "WDLNWCE", "FLACE"])
@pytest.mark.parametrize("weights", ["imagenet", "pretrain"])
def test_a_cell_comes_back_from_its_record(loss, weights):
    cell = paper_cell(loss=loss, weights=weights, seed=3, learning_rate=1 / 3, crop=(96, 128))
    for record in (cell.model_dump_json(), json.dumps(json.loads(cell.model_dump_json()))):
        again = Cell.model_validate_json(record)
        assert again == cell
        assert again.signature == cell.signature and again.bundle_key == cell.bundle_key
        assert again.backbone_key == cell.backbone_key
        assert again.loss == parse_loss(loss)
    assert Cell.model_validate(cell.model_dump(mode="json")) == cell


def test_keys_are_short_and_fit_for_file_names():
    cell = pretrained_cell()
    for key in (cell.signature, cell.bundle_key, cell.backbone_key):
        assert len(key) == 16 and set(key) <= set("0123456789abcdef")


def test_a_cell_has_a_name_that_people_use():
    assert paper_cell(loss="DLNWCE", seed=2).name == "streets/fcn_resnet101/DLNWCE/2"


# --- bundles ----------------------------------------------------------------------------------


def paper_grid(**protocol):
    return [
        paper_cell(model, loss=loss, seed=seed, **protocol)
        for model, loss, seed in itertools.product(
            (FCN, DEEPLAB), ("WCE", "WDL", "WDLNWCE"), (0, 1)
        )
    ]


def test_all_losses_of_both_heads_share_a_backbone_for_each_seed():
    grouped = bundles(paper_grid())
    assert len(grouped) == 2
    for cells in grouped.values():
        assert len({cell.seed for cell in cells}) == 1
        assert [(cell.model, cell.loss.name) for cell in cells] == list(
            itertools.product((FCN, DEEPLAB), ("WCE", "WDL", "WDLNWCE"))
        )
    assert len({cell.signature for cells in grouped.values() for cell in cells}) == 12


def test_backbones_of_different_depth_are_not_shared():
    grouped = bundles([paper_cell(FCN), paper_cell("fcn_resnet50")])
    assert len(grouped) == 2


@pytest.mark.parametrize("weights", ["coco", "pre-fine"])
def test_cocos_backbones_are_those_of_each_model(weights):
    grouped = bundles(paper_grid(weights=weights))
    assert len(grouped) == 4
    assert all(len({cell.model for cell in cells}) == 1 for cells in grouped.values())


@pytest.mark.parametrize("weights", [*PUBLISHED, "own.pth"])
def test_cells_share_a_weights_key_if_they_start_from_one_file(weights):
    cells = [c for w in (weights, "none") for c in paper_grid(weights=w)]
    cells.append(paper_cell("fcn_resnet50", weights=weights))
    for one, other in itertools.combinations(cells, 2):
        starts = [(c.protocol.weights, MODELS[c.model].backbone) for c in (one, other)]
        files = [FILES.get((c.protocol.weights, c.model)) for c in (one, other)]
        same = starts[0] == starts[1] and files[0] == files[1]
        assert (one.weights_key == other.weights_key) == same


def test_cells_that_train_the_whole_network_share_with_none():
    assert [len(cells) for cells in bundles(paper_grid(train="all")).values()] == [1] * 12


def test_bundles_keep_the_order_of_the_grid():
    cells = paper_grid()
    grouped = list(bundles(cells).values())
    assert [group[0] for group in grouped] == [cells[0], cells[1]]
    assert all(group == sorted(group, key=cells.index) for group in grouped)


# --- the backbone that is trained first -------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"seed": 5}, {"loss": "WDLAWCE"}, {"model": DEEPLAB}, {"epochs": 3}, {"batch_size": 3},
     {"learning_rate": 0.5}, {"bins": 20}, {"counting": "reference"}, {"eval_size": 0},
     {"naive_ramp": (0.1, 0.2)},
     {"alternating_ramp": (0.1, 0.2)}, {"backbone_batchnorm": "train"}, {"threads": 7}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_pretrained_backbone_serves_cells_that_differ_in(changes):
    one = paper_cell(weights="pretrain")
    other = paper_cell(**{"weights": "pretrain", **changes})
    assert other.backbone_key == one.backbone_key


@pytest.mark.parametrize(
    "changes",
    [{"model": "fcn_resnet50"}, {"resize": (100, 200)}, {"crop": (96, 96)}, {"flip": 0.0},
     {"momentum": 0.5}, {"weight_decay": 0.0}, {"decay": "polynomial"}, {"precision": "mixed"},
     {"batchnorm_momentum": 0.5}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_another_backbone_is_trained_where_its_training_differs_in(changes):
    one = paper_cell(weights="pretrain")
    other = paper_cell(**{"weights": "pretrain", **changes})
    assert other.backbone_key != one.backbone_key


@pytest.mark.parametrize("model", [FCN, DEEPLAB])
def test_a_backbone_is_pretrained_whole_with_an_fcn_head_and_cross_entropy(model):
    consumer = paper_cell(model, weights="pretrain", loss="WDLAWCE", seed=5, crop=(96, 96))
    assert consumer.signature  # a plan has asked for it
    cell = pretraining_cell(consumer)
    settings = consumer.protocol.pretrain
    assert (cell.model, cell.loss, cell.seed) == (FCN, parse_loss("CE"), settings.seed)
    assert (cell.dataset, cell.data) == (consumer.dataset, consumer.data)
    protocol = cell.protocol
    assert (protocol.train, protocol.weights, protocol.crop) == ("all", "none", (96, 96))
    assert (protocol.epochs, protocol.batch_size) == (settings.epochs, settings.batch_size)
    assert protocol.learning_rate == settings.learning_rate
    assert cell.signature != consumer.signature


@pytest.mark.parametrize("changes", [{"dataset": "voc"}, {"data": "f" * 16}])
def test_another_data_set_has_a_backbone_of_its_own(changes):
    one = paper_cell(weights="pretrain")
    assert one.model_copy(update=changes).backbone_key != one.backbone_key


# --- paths ------------------------------------------------------------------------------------


def test_all_paths_of_a_run_lie_in_its_folder_and_differ():
    paths, key = RunPaths("/runs/one"), "0123456789abcdef"
    of_a_key = [paths.task(key), paths.progress_of(key), paths.generations(key)]
    of_a_key += [paths.checkpoints(key), paths.counts_of(key, 2), paths.failure(key)]
    of_a_key += [paths.head(key), paths.backbone(key)]
    assert len(set(of_a_key)) == len(of_a_key)
    for path in of_a_key:
        assert path.is_relative_to("/runs/one") and key in path.name
    assert paths.counts_of(key, 2) != paths.counts_of(key, 3)
