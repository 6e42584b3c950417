"""Under `deterministic = true` a GPU trains and evaluates with nothing that torch refuses there.

No GPU is needed: torch chooses by device, and its device without memory, `meta`, is no CPU either.
Losses look at values, so they run here, and what they ask of torch is listed.
"""

import math
import os

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.segmentation.deeplabv3 import ASPPPooling

from data_prep.settings import VOID
from jobs.losses import functional as losses
from jobs.losses import pooling
from jobs.losses.functional import OfClass, combined_loss
from jobs.losses.grammar import parse_loss
from jobs.metrics.reference import count_image
from jobs.models import resize as resizing
from jobs.models.build import Network, build_backbone, build_head, upsample
from jobs.models.dropout import set_dropout_position
from jobs.models.registry import MODELS
from jobs.models.resize import Resize, replace_resizing, resize
from jobs.spec.protocol import Protocol
from jobs.training.torch_settings import configure_torch
from tests.jobs.oracles import a_batch

# What `torch.use_deterministic_algorithms` says raises on a GPU, by the names it has inside torch.
REFUSED = {
    "adaptive_max_pool2d_backward", "_adaptive_avg_pool2d_backward", "avg_pool3d_backward",
    "bincount", "cumsum", "grid_sampler_2d_backward", "histc", "max_unpool2d", "median",
    "nll_loss2d_forward", "nll_loss_forward", "put", "put_", "reflection_pad2d_backward",
    "replication_pad2d_backward", "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward", "upsample_linear1d_backward", "upsample_trilinear3d_backward",
}  # fmt: skip
# What torch does instead of some others: it sorts an index for every element.
SORTED = {"_unsafe_index", "_unsafe_index_put", "index_put", "index_put_", "_index_put_impl_"}


class Asked(TorchDispatchMode):
    """The names of all operations inside the block, also those of backward passes."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        of_integers = name == "cumsum" and not args[0].is_floating_point()
        unweighted = name == "bincount" and args[1:2] in ((), (None,))
        if not (of_integers or unweighted):  # these two are allowed
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def asked_by_training(model):
    """Run one step of a whole network, from images to the gradients of all weights."""
    with torch.device("meta"):
        network = Network(
            build_backbone(MODELS[model].backbone, 0, 0.1), build_head(model, 3, 0, 0.1)
        ).train()
        images = torch.empty(2, 3, 64, 96)
    set_dropout_position(network, 0, model, 0, range(2))
    with Asked() as asked:
        upsample(network(images), (64, 96)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    return asked.names


# every kind of backbone and of head
@pytest.mark.parametrize("model", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "unet_resnet50"])
def test_every_network_can_be_trained(deterministic, model):
    names = asked_by_training(model)
    assert "convolution_backward" in names
    assert names & (REFUSED | SORTED) == set()


def test_a_gpu_resizes_by_products_without_it_too(monkeypatch):
    assert "upsample_bilinear2d_backward" not in asked_by_training("unet_resnet50")
    monkeypatch.setattr(resizing, "by_products", lambda device: False)  # as benchmarks do
    assert "upsample_bilinear2d_backward" in asked_by_training("unet_resnet50")


@pytest.mark.parametrize(
    "name", ["CE", "WCE", "CEMP", "WFLMP", "WDL", "FL", "TL", "WTL", "WDLNWCE"]
)
def test_every_loss_can_be_trained(deterministic, monkeypatch, name):
    monkeypatch.setattr(pooling, "prefix_sums", pooling.sums_by_rows)  # as on a GPU, see below
    logits, target = a_batch()
    weights = torch.tensor([0.5, 1.5, 0.8, 1.2], dtype=torch.float64)
    with Asked() as asked:
        loss = combined_loss(logits.requires_grad_(), target, parse_loss(name), 0.5, weights, VOID)
        loss.backward()
    assert "_log_softmax_backward_data" in asked.names
    assert asked.names & REFUSED == set()


def test_an_image_can_be_counted(deterministic):
    logits, target = a_batch(images=1)
    with Asked() as asked:
        counts = count_image(logits[0], target[0], 10, VOID)
    assert counts.pixels > 0
    assert asked.names & REFUSED == set()


# --- the gradient of resizing -----------------------------------------------------------------

SIZES = [
    ((3, 4), (24, 32)),  # as from a backbone's stride
    ((5, 7), (33, 50)),
    ((5, 7), (9, 13)),  # as in a U-Net, whose features are rounded up
    ((6, 9), (4, 5)),
    ((1, 1), (5, 3)),
    ((4, 6), (4, 6)),
]


@pytest.mark.parametrize("before, after", SIZES)
def test_the_gradient_of_resizing_is_that_of_torch(before, after):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, *before, generator=generator, dtype=torch.float64)
    above = torch.randn(2, 3, *after, generator=generator, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    resized = Resize.apply(ours, after)
    expected = functional.interpolate(theirs, after, mode="bilinear")
    assert torch.equal(resized, expected)
    resized.backward(above)
    expected.backward(above)
    assert (ours.grad - theirs.grad).norm() <= 1e-12 * theirs.grad.norm()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_gradient_of_half_precision_is_added_up_in_single_precision(half):
    """An image of one colour: each pixel of the small one gets the weight of those it spreads to,
    here 64, which 64 additions of halves would miss."""
    x = torch.zeros(1, 1, 40, 40, dtype=half, requires_grad=True)
    resized = Resize.apply(x, (320, 320))
    resized.backward(torch.full_like(resized, 0.1))
    inner = x.grad[0, 0, 1:-1, 1:-1]
    assert torch.equal(inner, torch.full_like(inner, 64 * float(torch.tensor(0.1, dtype=half))))


@pytest.fixture(params=[torch.float16, torch.bfloat16])
def half_on_a_gpu(request):
    """Autocast as on a GPU; `torch.autocast` itself refuses to where there is none."""
    torch.set_autocast_dtype("cuda", request.param)
    torch.set_autocast_enabled("cuda", True)
    yield request.param
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", torch.float16)


def test_autocast_changes_no_dtype_of_resizing(half_on_a_gpu):
    """torch's own result is float32 there, twice as large; the next convolution casts it back."""
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, 4, device="cuda", dtype=half_on_a_gpu)
        assert functional.interpolate(x, (6, 8), mode="bilinear").dtype == torch.float32
        assert resize(x, (6, 8)).dtype == half_on_a_gpu
        assert resize(x.float(), (6, 8)).dtype == torch.float32


def test_the_cpu_keeps_torchs_own_gradient(deterministic):
    """It is deterministic there, so the setting changes no bit."""
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    assert resize(x, (6, 8)).grad_fn.name() == "UpsampleBilinear2DBackward0"


def test_deeplabs_pooling_branch_is_torchvisions():
    theirs = ASPPPooling(6, 4).double().eval()
    ours = ASPPPooling(6, 4).double().eval()
    ours.load_state_dict(theirs.state_dict())
    replace_resizing(ours)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.equal(ours(one), theirs(other))
    for module, images in ((ours, one), (theirs, other)):
        (module(images) ** 2).sum().backward()
    assert torch.equal(one.grad, other.grad)


# --- the gradient of the true class -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_the_true_class_is_that_of_torch(dtype):
    generator = torch.Generator().manual_seed(5)
    ours = torch.randn(2, 4, 5, 7, generator=generator, dtype=dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    index = torch.randint(0, 4, (2, 5, 7), generator=generator)
    found, expected = OfClass.apply(ours, index), theirs.gather(1, index[:, None])[:, 0]
    assert torch.equal(found, expected)
    above = torch.randn(2, 5, 7, generator=generator, dtype=dtype)
    found.backward(above)
    expected.backward(above)
    assert torch.equal(ours.grad, theirs.grad)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(OfClass.apply, (ours, index))


@pytest.mark.parametrize("name", ["WCE", "WFL", "WDLNWCE"])
def test_no_loss_scatters_its_gradient_on_a_gpu(deterministic, monkeypatch, name):
    """Under the setting torch scatters there by sorting."""

    def gradient():
        logits, target = a_batch()
        with Asked() as asked:
            loss = combined_loss(
                logits.requires_grad_(), target, parse_loss(name), 0.5, torch.ones(4), VOID
            )
            loss.backward()
        return logits.grad, asked.names

    on_cpu, names = gradient()
    assert "scatter_add" in names
    monkeypatch.setattr(losses, "by_comparison", lambda device: True)
    ours, names = gradient()
    assert {name for name in names if name.startswith("scatter")} | names & SORTED == set()
    assert torch.equal(ours, on_cpu)


# --- the sums of max-pooling ------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2, 255, 256, 257, 70_000])
def test_prefix_sums_are_those_of_exact_addition(number):
    values = np.random.default_rng(number).exponential(size=number) ** 4
    sums = pooling.sums_by_rows(torch.from_numpy(values)).numpy()
    assert sums.shape == (number,)
    for end in np.linspace(0, number - 1, 20).astype(int) if number else []:
        assert sums[end] == pytest.approx(math.fsum(values[: end + 1]), rel=1e-13)


def test_a_gpu_needs_no_cumsum_of_torch(deterministic):
    with Asked() as asked:
        sums = pooling.prefix_sums(torch.empty(1000, dtype=torch.float64, device="meta"))
    assert sums.shape == (1000,)
    assert "cumsum" not in asked.names


def test_pooling_by_rows_gives_the_same_weights(monkeypatch):
    losses = torch.from_numpy(np.random.default_rng(8).exponential(size=5000) ** 2)
    expected = pooling.pooling_weights(losses, lambda total: total)
    monkeypatch.setattr(pooling, "prefix_sums", pooling.sums_by_rows)
    weights = pooling.pooling_weights(losses, lambda total: total)
    assert torch.allclose(weights, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("given, used", [(None, "0"), ("1", "1")])
def test_gpus_do_not_add_in_their_switch_unless_the_user_wants_it(
    deterministic, monkeypatch, given, used
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", given or "")
    if given is None:
        monkeypatch.delenv("NCCL_NVLS_ENABLE")
    configure_torch(Protocol(threads=1))
    assert os.environ.get("NCCL_NVLS_ENABLE") == given
    configure_torch(Protocol(threads=1, deterministic=True))
    assert os.environ["NCCL_NVLS_ENABLE"] == used


def test_new_tensors_are_not_filled(deterministic, monkeypatch):
    """By default torch fills them with NaN under deterministic algorithms."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    filled = torch.empty(1 << 16)  # kept, so that its memory is not used again below
    configure_torch(Protocol(threads=1, deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    new = torch.empty(1 << 16)
    assert filled.isnan().all() and not new.isnan().all()
