"""The forecast says what a plan costs before anything is queued."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bundle_job
from benchmarks.bundle_job import ready
from benchmarks.gpu_check import ASSUMED
from hpc.scheduler.cluster_profile import ClusterProfile
from hpc.storage.atomic import write_json
from jobs.models.build import Backbone, Network, build_backbone, build_head
from jobs.models.dropout import set_dropout_position
from jobs.models.registry import MODELS
from jobs.spec.protocol import Protocol
from jobs.spec.task import write_task
from pipeline import submit
from pipeline.planning.cost_model import (
    FLOPS,
    Cost,
    Job,
    cells_that_fit,
    cost,
    evaluation_flops,
    gpu_bytes,
    slower_than_modelled,
    step_flops,
    wall_seconds,
)
from pipeline.planning.forecast import Forecast
from pipeline.planning.plan import make_plan
from tests.jobs.cells import a_cell
from tests.pipeline.grids import small_grid

REPOSITORY = Path(__file__).parents[3]
PAPER = ["fcn_resnet101", "deeplabv3_resnet101"]
V100 = ClusterProfile(gpus_per_node=1, gpu_memory_gb=16, minutes=1440)


def a_job(*models, images=1464, val=1449 * 520 * 693, **protocol):
    settings = {"weights": "imagenet", **protocol}
    cells = [a_cell("CE", model, **settings) for model in models]
    return Job(cells, images, val, 21)


def test_a_step_costs_what_the_paper_s_models_compute():
    """At 480 pixels the backbone has 156 GMAC forward, FCN's head 34, DeepLabV3's 56."""
    job = a_job(*PAPER)
    assert step_flops(job) == pytest.approx(24 * (155.8 + 2 * 34.0 + 2.1 * 56.2) * 1e9, rel=0.01)
    whole = a_job(PAPER[0], train="all")
    assert step_flops(whole) == pytest.approx(12 * 2 * 3 * (155.8 + 34.0) * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("model", "train"),
    # torch counts the gradients of a grouped convolution, as MobileNet's, as if it had one group
    [*((m, "head") for m in MODELS), *((m, "all") for m in MODELS if "mobilenet" not in m)],
)
def test_a_step_has_the_operations_that_torch_counts(model, train):
    """Counted without computing anything: the tensors have shapes alone."""
    images, crop = 2, 64
    backbone = MODELS[model].backbone
    settings = {"batch_size": images, "crop": (crop, crop), "weights": "none", "train": train}
    with torch.device("meta"):
        features = build_backbone(backbone, 0, 0.1).eval().requires_grad_(train == "all")
        network = build_head(model, 21, 0, 0.1).eval()  # in `eval` without dropout
    pictures = torch.empty(images, 3, crop, crop, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(features(pictures)).sum().backward()
    estimated = step_flops(Job([a_cell("CE", model, **settings)], 9, 0, 21))
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_a_trained_cell_holds_its_weights_gradients_and_momentum_and_no_fourth_copy():
    """The memory that each further cell adds to a job, counted after a step."""
    model = "fcn_mobilenet_v3_large"
    few, many = (
        gpu_bytes(Job([a_cell("CE", model)] * number, 9, 0, 21), ranks=1) for number in (1, 2)
    )
    added = bytes_of_tensors_after_a_step(model, 2) - bytes_of_tensors_after_a_step(model, 1)
    assert (many - few) / 1.2 == pytest.approx(added, rel=0.02)


def bytes_of_tensors_after_a_step(model, number):
    protocol = Protocol(weights="none", batch_size=2, crop=(32, 32), threads=1)
    with ready(protocol) as group:
        job = bundle_job.Job(model, group, protocol)
        trainers = job.cells(["CE"] * number)
        job.step(trainers)
        gc.collect()
        storages = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for one in gc.get_objects()
            if isinstance(one, torch.Tensor)
        }
        del job, trainers
    return sum(storages.values())


def test_the_backbone_is_paid_once_however_many_cells_share_it():
    one, many = step_flops(a_job(PAPER[0])), step_flops(a_job(*[PAPER[0]] * 16))
    assert many == pytest.approx(12 * 2 * (155.8 + 16 * 2 * 34.0) * 1e9, rel=0.01)
    assert many < 16 * one


def test_time_is_steps_and_one_evaluation_at_the_rate_of_all_ranks():
    job = a_job(*PAPER)
    assert job.steps == 30 * (1464 // 12)
    seconds = (job.steps * step_flops(job) + evaluation_flops(job)) / FLOPS["gpu fp32"]
    assert cost(job, V100).seconds == pytest.approx(seconds)
    four = V100.model_copy(update={"tasks_per_node": 4})
    assert cost(job, four).seconds == pytest.approx(seconds / 4)
    mixed = a_job(*PAPER, precision="mixed")  # which evaluation is not
    steps, images = job.steps * step_flops(job), evaluation_flops(job)
    seconds = steps / FLOPS["gpu mixed"] + images / FLOPS["gpu fp32"]
    assert cost(mixed, V100).seconds == pytest.approx(seconds)


def test_a_measured_step_takes_the_place_of_the_rates():
    job = a_job(*PAPER, val=0)
    factor = slower_than_modelled(3.0, job, V100)
    assert cost(job, V100, factor).seconds == pytest.approx(3.0 * job.steps)


@pytest.mark.parametrize("model", ["fcn_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_memory_is_near_what_a_step_really_keeps(model):
    """Against the tensors that autograd saves, counted."""
    crop, images = 128, 2
    job = Job([a_cell("CE", model, batch_size=images, crop=(crop, crop), train="all")], 9, 0, 21)
    head = build_head(model, 21, 0, 0.1)
    set_dropout_position(head, 0, model, 0, range(images))
    network = Network(Backbone(MODELS[model].backbone), head).train()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(torch.randn(images, 3, crop, crop))
        logits = nn.functional.interpolate(logits, size=(crop, crop), mode="bilinear")
        logits.log_softmax(1).exp().sum().backward()
    weights = 3 * sum(4 * parameter.numel() for parameter in network.parameters())
    found = sum(kept.values()) - weights / 3 + weights  # what is kept holds the weights themselves
    estimated = (gpu_bytes(job, ranks=1) - 1.5e9) / 1.2
    assert 0.6 * found < estimated < 2.0 * found


def test_fewer_cells_go_into_a_job_where_memory_or_time_is_short():
    job = a_job(*PAPER * 16)
    roomy = V100.model_copy(update={"gpu_memory_gb": 400, "minutes": 10**6})
    assert cells_that_fit(job, roomy) == 32
    for short in ({"gpu_memory_gb": 10}, {"minutes": 400}):
        cluster = roomy.model_copy(update=short)
        number = cells_that_fit(job, cluster)
        assert 1 < number < 32
        for count, fits in ((number, True), (number + 1, False)):
            part = cost(replace(job, cells=job.cells[:count]), cluster)
            within = part.gpu_bytes <= cluster.gpu_memory_gb * 1e9 and part.seconds <= (
                60 * cluster.minutes
            )
            assert within is fits
    assert cells_that_fit(job, roomy.model_copy(update={"gpu_memory_gb": 1})) == 1


def test_jobs_that_wait_for_one_another():
    costs = [Cost(seconds, 0, 0, 0, 0) for seconds in (4, 3, 2, 1)]
    assert wall_seconds(costs, 1) == 10
    assert wall_seconds(costs, 2) == 5  # 4 and then 1, 3 and then 2
    assert wall_seconds(costs, 9) == 4
    assert wall_seconds([], 3) == 0


@pytest.fixture
def paper(tmp_path, monkeypatch, capsys):
    """Return the output of a dry run of a grid file in configs/, on a machine without its data."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    monkeypatch.setenv("PATH", "/no slurm")

    def said(name, *options):
        assert submit.main(["grid", f"configs/{name}.toml", "--dry-run", *options]) == 0
        return capsys.readouterr().out

    return said


def test_the_paper_s_experiment_is_400_cells_in_28_jobs(paper):
    out = paper("paper")
    assert "paper: 400 cells: 400 missing" in out
    assert "would submit 28 jobs for 400 cells" in out
    for word in ("GPU hours", "GB of a GPU", "GB of a node", "storage at most", "assumes that"):
        assert word in out
    assert "cityscapes/fcn_resnet101 has no pre-fine: pre-fine needs VOC's 21 classes" in out
    missing = [line for line in out.splitlines() if line.startswith("note: missing: ")]
    assert out.splitlines()[-6:] == missing
    for one, word in zip(missing, ("VOCtrainval", "benchmark.tgz", "leftImg8bit_trainvaltest.zip",
                         "fcn_resnet101_coco", "resnet101-", "deeplabv3_resnet101_coco"),
                         strict=True):  # fmt: skip
        assert word in one


def test_small_gpus_and_a_day_make_more_jobs_of_it(paper):
    out = paper("paper", "--cluster", "v100-16gb-24h")
    jobs = int(out.split("would submit ")[1].split()[0])
    assert 28 < jobs <= 400


def test_the_published_code_s_experiment_has_as_many_cells(paper):
    out = paper("published-code")
    assert "would submit 28 jobs for 400 cells" in out


def test_a_run_that_has_shown_its_steps_is_estimated_from_them(tmp_path, shards):
    grid = small_grid(tmp_path)
    plan = make_plan(grid, grid.cells, {}, (), {})
    before = " ".join(Forecast(grid).lines(plan.bundles))
    assert "not measured" in before
    task = plan.bundles[0]
    write_task(task)
    write_json(grid.run.progress_of(task.name), {"steps_per_second": 0.001, "step": 3})
    after = list(Forecast(grid).lines(plan.bundles))
    assert "from the step times of 1 job of this run" in after[-1]
    # 2 epochs of 3 steps, 1000 s each, and an evaluation slower by as much
    assert "min for the longest job" in after[0]
    asked = list(Forecast(grid, step_seconds=1e5).lines(plan.bundles))
    assert "from a step of 100000 s" in asked[-1]
    assert "days for the longest job" in asked[0]


BUNDLES = {"1 FCN": PAPER[:1], "8 FCN": PAPER[:1] * 8, "16 FCN and 16 DeepLabV3": PAPER * 16}


def test_the_page_on_cost_has_the_numbers_of_the_model():
    page = (REPOSITORY / "docs/explanation/cost.md").read_text()
    for (chip, precision), rate in ASSUMED.items():
        steps = [f"{step_flops(a_job(*models)) / rate:.2g} s" for models in BUNDLES.values()]
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {chip}, {precision} |"))
        assert row.endswith(f" | {rate / 1e12:.0f} | {' | '.join(steps)} |")
    for bundle, models in BUNDLES.items():
        sizes = [f"{gpu_bytes(a_job(*models), ranks) / 1e9:.1f} GB" for ranks in (1, 4)]
        assert f"| {bundle} | {' | '.join(sizes)} |" in page
    for chip, rate in {"V100": 9e12, "A100": 11e12, "H100": 38e12}.items():
        passes = evaluation_flops(a_job(*PAPER * 16)) / rate / 60
        counting = [f"{0.0148 * 1449 * 32 / threads / 60:.2g} min" for threads in (1, 10)]
        assert f"| {chip} | {rate / 1e12:.0f} | {passes:.2g} min | {' | '.join(counting)} |" in page
