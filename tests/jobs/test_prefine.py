"""pre-fine: CE that starts from weights trained on COCO with VOC's classes, backbone and head."""

import pytest
import torch
from torchvision.models import segmentation

from data_prep import weights as command
from data_prep.pack import pack
from data_prep.weights import FILES, weights_path
from hpc.cli import UserError, run
from hpc.distributed.preemption import StopRequest
from hpc.storage.atomic import file_sha256
from jobs import train
from jobs.losses.grammar import parse_loss
from jobs.models.build import seeded
from jobs.spec.counts_file import read_index
from jobs.spec.task import Task
from jobs.training import backbone
from jobs.training.predictor import Predictor
from pipeline import submit
from tests.jobs.models.published import publish
from tests.pipeline.grids import grid_file, pairs, small_grid

FCN, DEEPLAB, MOBILE = "fcn_resnet101", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large"
VOC = """
[dataset.voc]
source = "folder"
root = "{folder}/images"
shards = "{folder}/voc"
classes = [{classes}]
"""


def classes(count):
    return ", ".join(f'"class {number}"' for number in range(count))


def with_voc(folder, models, *changes, count=21, **options):
    """A grid of `models` that has pre-fine among its losses and a data set as VOC beside the
    streets, with their 8 classes."""
    changes = (
        ('["fcn_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"]', str(list(models))),
        ('"DLNWCE"', '"pre-fine"'),
        *changes,
    )
    voc = VOC.format(folder=folder, classes=classes(count))
    more = voc + options.pop("more", "")
    return small_grid(folder, *changes, more=more, **options)


@pytest.fixture(autouse=True)
def torch_home(tmp_path, monkeypatch):
    """An empty folder in which torch keeps its weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


# --- planning ---------------------------------------------------------------------------------


def test_only_a_data_set_with_the_classes_of_voc_has_it(tmp_path):
    grid = with_voc(tmp_path, [FCN, DEEPLAB])
    names = {cell.name for cell in grid.cells if cell.loss.name == "pre-fine"}
    assert names == {f"voc/{model}/pre-fine/{s}" for model in (FCN, DEEPLAB) for s in (0, 1)}
    assert sum(cell.dataset == "streets" for cell in grid.cells) == 4  # CE alone
    why = "has no pre-fine: pre-fine needs VOC's 21 classes, not 8"
    assert grid.notes == (f"streets/{FCN} {why}", f"streets/{DEEPLAB} {why}")


def test_it_is_cross_entropy_from_other_weights_under_the_same_protocol(tmp_path):
    grid = with_voc(tmp_path, [FCN, DEEPLAB])
    cells = {cell.name: cell for cell in grid.cells}
    plain, fine = cells[f"voc/{FCN}/CE/0"], cells[f"voc/{FCN}/pre-fine/0"]
    assert (fine.loss.terms, fine.loss.schedule) == (plain.loss.terms, plain.loss.schedule)
    assert fine.protocol.weights == "pre-fine" and plain.protocol.weights == "none"
    assert fine.protocol == plain.protocol.model_copy(update={"weights": "pre-fine"})


def test_its_backbone_is_shared_with_no_other_cell(tmp_path):
    """FCN's and DeepLabV3's files have different backbones."""
    grid = with_voc(tmp_path, [FCN, DEEPLAB], ("seeds = [0, 1]", "seeds = [0]"))
    fine = [cell for cell in grid.cells if cell.loss.name == "pre-fine"]
    keys = [cell.bundle_key for cell in grid.cells]
    assert len(fine) == 2 and [keys.count(cell.bundle_key) for cell in fine] == [1, 1]


def test_a_model_without_weights_from_coco_has_none(tmp_path):
    grid = with_voc(tmp_path, [FCN, "unet_resnet50"])
    fine = {cell.model for cell in grid.cells if cell.loss.name == "pre-fine"}
    assert fine == {FCN}
    why = "has no pre-fine: no weights trained on COCO are published for unet_resnet50"
    assert f"voc/unet_resnet50 {why}" in grid.notes


def refused(*arguments, **options):
    with pytest.raises(UserError) as error:
        with_voc(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_grid_that_names_it_and_cannot_have_it_is_refused(tmp_path):
    message = refused(tmp_path, [FCN], count=20)
    assert message.startswith(f"{tmp_path}/grid.toml: streets/{FCN} cannot start from pre-fine: ")
    assert message.endswith("pre-fine needs VOC's 21 classes, not 8")


def test_nor_can_other_losses_start_from_weights_that_do_not_fit(tmp_path):
    message = refused(tmp_path, [FCN], ('weights = "none"', 'weights = "pre-fine"'))
    assert f"streets/{FCN} cannot start from pre-fine" in message


def test_where_they_fit_other_losses_can(tmp_path):
    special = '[protocol.per_dataset.voc]\nweights = "pre-fine"\n'
    grid = with_voc(tmp_path, [FCN], more=special)
    (cell,) = (c for c in grid.cells if c.name == f"voc/{FCN}/CE/0")
    assert (cell.loss, cell.protocol.weights) == (parse_loss("CE"), "pre-fine")


def test_its_name_belongs_to_no_other_loss(tmp_path):
    own = '[[loss]]\nname = "pre-fine"\nterms = ["DL"]\n'
    message = refused(tmp_path, [FCN], ('"pre-fine"', '"FL"'), more=own)
    assert "another loss has that name already" in message


def test_a_misspelt_one_is_recognised(tmp_path):
    assert "did you mean 'pre-fine'" in refused(tmp_path, [FCN], ('"CE"', '"prefine"'))


# --- files ------------------------------------------------------------------------------------


@pytest.fixture
def ready(tmp_path):
    """The path of a grid file, whose data sets can be packed."""
    pairs(tmp_path / "images", "abc")
    with_voc(tmp_path, [MOBILE])
    return tmp_path / "grid.toml"


def test_a_missing_file_is_refused_before_anything_is_queued(tmp_path, ready, capsys):
    with pytest.raises(SystemExit) as ended:
        run(submit.main, ["grid", str(ready)])
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert f"weights = 'pre-fine' needs {weights_path('pre-fine', MOBILE)}" in line
    assert "python -m data_prep.weights" in line
    assert not [*tmp_path.glob("**/tasks"), *tmp_path.glob("**/queue")]


def test_a_dry_run_says_which_cells_there_are_not(ready, capsys):
    publish("pre-fine", MOBILE)
    assert submit.main(["grid", str(ready), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"note: streets/{MOBILE} has no pre-fine: pre-fine needs VOC's 21 classes" in printed
    assert "6 cells" in printed  # CE twice, pre-fine once, times two seeds


def test_the_login_node_fetches_what_it_starts_from_and_no_more(tmp_path, monkeypatch):
    """A U-Net has no such file, and the streets need none."""
    fetched = []

    def pretend(path):
        fetched.append(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr(command, "fetch", pretend)
    config = with_voc(tmp_path, [FCN, MOBILE, "unet_resnet50"]).path
    assert command.main([str(config)]) == 0
    assert set(fetched) == {FILES["coco", FCN], FILES["coco", MOBILE]}

    fetched.clear()
    streets = grid_file(tmp_path, ('["fcn_mobilenet_v3_large", ', f'["{FCN}", '))
    assert command.main([str(streets)]) == 0
    assert fetched == []


# --- training ---------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path, ready, monkeypatch):
    """A job that trains a pre-fine cell; its file has the published name and random weights."""
    monkeypatch.setattr(backbone, "check_published", lambda path: None)
    with seeded("published"):
        model = segmentation.deeplabv3_mobilenet_v3_large(weights_backbone=None, aux_loss=True)
    publish("pre-fine", MOBILE, **model.state_dict())
    changes = ("epochs = 2", "epochs = 1\nlearning_rate = 1e-9\nworkers = 0")
    grid = with_voc(tmp_path, [MOBILE], changes)
    pack("voc", grid.datasets["voc"], processes=1)
    cell = next(cell for cell in grid.cells if cell.loss.name == "pre-fine")
    settings = grid.datasets["voc"]
    return Task(
        kind="bundle", name="fine", run=str(grid.run.root), data=settings.shards,
        origin=settings.origin(), cells=(cell,),
    )  # fmt: skip


def test_the_head_goes_on_from_the_files_classifier(task, alone):
    """At a rate at which no step moves a weight by much, it stays what it was."""
    train.train_bundle(task, alone, StopRequest())
    path = task.paths.head(task.cells[0].signature)
    trained = torch.load(path, weights_only=True)["weights"]
    file = torch.load(weights_path("pre-fine", MOBILE), weights_only=True)
    learnt = [name for name in trained if name.endswith(("weight", "bias"))]
    assert len(learnt) == 23  # five branches, what joins them, and two convolutions
    for name in learnt:
        torch.testing.assert_close(trained[name], file[f"classifier.{name}"], rtol=0, atol=1e-6)
    found = Predictor(path, task.paths, alone)._network.backbone.state_dict()
    assert all(torch.equal(found[name], file[name]) for name in found)


def test_its_counts_name_the_file_it_started_from(task, alone):
    train.train_bundle(task, alone, StopRequest())
    (path,) = task.paths.counts.glob("*.json")
    columns = read_index(path).columns
    assert columns["name"] == [f"voc/{MOBILE}/pre-fine/0"]
    assert columns["backbone"] == [file_sha256(weights_path("pre-fine", MOBILE))]


def test_a_classifier_of_other_classes_is_refused_by_the_job_too(task, alone):
    """Planning has seen to it; a file may have been exchanged since."""
    publish("pre-fine", MOBILE, num_classes=20)
    with pytest.raises(UserError) as error:
        train.train_bundle(task, alone, StopRequest())
    assert "'classifier.4.weight' has shape (20, 256, 1, 1), not (21, 256, 1, 1)" in str(
        error.value
    )
