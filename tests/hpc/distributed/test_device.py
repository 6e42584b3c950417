"""A rank gets a GPU for which torch has kernels, and that no other rank has, or all are refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hpc.cli import UserError
from hpc.distributed import device as devices
from hpc.distributed.device import (
    RankDevice,
    agreed_device,
    disagreement,
    granted_gpus,
    has_kernels,
    own_device,
)
from hpc.distributed.launcher import RankEnv

# `torch.cuda.get_arch_list()` of the wheels for Linux on x86-64. Sources: the table of supported
# architectures in RELEASE.md of PyTorch (2.9 and 2.10 have the same), .ci/manywheel/build_cuda.sh
# of each release, and github.com/pytorch/pytorch/issues/182250, which prints the second-last list.
WHEELS = {
    "2.7+cu126": "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90",
    "2.7+cu128": "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120",
    "2.10+cu126": "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90",
    "2.10+cu128": "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120",
    "2.10+cu130": "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120",
}
# compute capabilities, from developer.nvidia.com/cuda-gpus
GPUS = {
    "P100": (6, 0), "P40": (6, 1), "V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "A40": (8, 6),
    "L40": (8, 9), "H100": (9, 0), "B200": (10, 0), "B300": (10, 3), "RTX PRO 6000": (12, 0),
    "GB10": (12, 1),
}  # fmt: skip
UP_TO_H100 = {"T4", "A100", "A40", "L40", "H100"}
BLACKWELL = {"B200", "B300", "RTX PRO 6000", "GB10"}
RUNS_ON = {
    "2.7+cu126": {"P100", "P40", "V100"} | UP_TO_H100,
    "2.7+cu128": UP_TO_H100 | BLACKWELL,
    "2.10+cu126": {"P100", "P40", "V100"} | UP_TO_H100,
    "2.10+cu128": {"V100"} | UP_TO_H100 | BLACKWELL,
    "2.10+cu130": UP_TO_H100 | BLACKWELL,
}


@pytest.mark.parametrize("wheel", WHEELS)
def test_a_wheel_runs_on_the_gpus_that_it_was_built_for(wheel):
    assert {gpu for gpu in GPUS if has_kernels(WHEELS[wheel].split(), GPUS[gpu])} == RUNS_ON[wheel]


def test_the_installed_wheel_has_the_architectures_of_the_table():
    version, _, cuda = torch.__version__.partition("+")
    flags = torch._C._cuda_getArchFlags() if hasattr(torch._C, "_cuda_getArchFlags") else None
    known = WHEELS.get(f"{'.'.join(version.split('.')[:2])}+{cuda}")
    if flags is None or known is None:
        pytest.skip(f"the table has no torch {torch.__version__}")
    assert flags == known


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("compute_70", (7, 0), True),
        ("compute_60", (7, 0), True),  # the driver compiles older PTX
        ("compute_75", (7, 0), False),  # and no newer one
        ("compute_90", (12, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_89", (8, 6), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("compute_90a", (10, 0), False),
        ("sm_120", (10, 0), False),
        ("gfx90a", (9, 0), False),
    ],
)
def test_code_runs_on_the_same_major_version_and_ptx_on_all_newer_ones(built, capability, runs):
    assert has_kernels([built], capability) == runs


def rank_env(rank: int, world_size: int = 4, local_ranks: int = 2) -> RankEnv:
    node = f"n{1 + rank // local_ranks}"
    return RankEnv("slurm", rank, world_size, rank % local_ranks, node, "7", "7-0")


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that makes torch see GPUs, by their UUIDs, of one compute capability."""

    def see(*uuids: str, capability: tuple[int, int] = (7, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: WHEELS["2.10+cu128"].split())
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda d: SimpleNamespace(uuid=uuids[d.index], name="Tesla V100"),
        )

    return see


def test_ranks_of_a_node_take_their_gpus_in_order(gpus):
    gpus("a", "b")
    assert [own_device(rank_env(rank), {}).index for rank in range(4)] == [0, 1, 0, 1]


def test_a_gpu_without_kernels_is_refused(gpus):
    gpus("a", capability=(6, 0))
    with pytest.raises(UserError, match=r"has no kernels for Tesla V100 \(sm_60\), only sm_70, "):
        own_device(rank_env(0), {})


@pytest.mark.parametrize(
    ("environ", "grant"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "4"}, ""),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),
        ({"SLURM_STEP_GPUS": "2,3", "CUDA_VISIBLE_DEVICES": "2,3"}, "SLURM_STEP_GPUS=2,3"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "SLURM_GPUS_ON_NODE=4"),
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),  # the local queue's
        ({"SLURM_JOB_GPUS": "0", "CUDA_VISIBLE_DEVICES": ""}, ""),  # hidden by the user
        ({"SLURM_JOB_GPUS": "", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),
    ],
)
def test_granted_gpus_that_torch_does_not_see_are_refused(gpus, environ, grant):
    gpus()
    assert granted_gpus(environ) == grant
    if grant:
        with pytest.raises(UserError, match=f"has GPUs \\({grant}\\), but torch .* sees none; "):
            own_device(rank_env(0), environ)
    else:
        assert own_device(rank_env(0), environ) == torch.device("cpu")


def ranks(*of: str, models: str = "VVVV") -> list[RankDevice]:
    """Ranks on two nodes with two ranks each, by their devices."""
    return [
        RankDevice(f"n{1 + rank // 2}", name, model=f"{model}100")
        for rank, (name, model) in enumerate(zip(of, models, strict=False))
    ]


@pytest.mark.parametrize(
    ("devices", "problem"),
    [
        (("cpu", "cpu", "cpu", "cpu"), ""),
        (("a", "b", "c", "d"), ""),
        (("a", "b", "c", "cpu"),
         "torch sees no GPU for rank 3 on n2, but one for ranks 0, 1, 2 on n1, n2; "),
        (("cpu", "cpu", "c", "d"),
         "torch sees no GPU for ranks 0, 1 on n1, but one for ranks 2, 3 on n2; "),
        (("a", "b", "c", "c"), "ranks 2, 3 on n2 share one GPU, but each needs its own; set "),
        (("a", "b", "a", "b"), "ranks 0, 2 on n1, n2 share one GPU, "),
    ],
)  # fmt: skip
def test_ranks_need_one_kind_of_device_and_a_gpu_each(devices, problem):
    found = disagreement(ranks(*devices))
    assert found.startswith(problem) and bool(found) == bool(problem)


def test_ranks_need_gpus_of_one_model():
    assert disagreement(ranks("a", "b", "c", "d", models="VVAV")) == (
        "the ranks have different GPUs (ranks 0, 1, 3 on n1, n2: V100, rank 2 on n2: A100), which "
        "may round differently; choose one model by constraint, gres or exclude in the profile"
    )


def test_the_problem_of_one_rank_is_that_of_all():
    refused = replace(ranks("a", "b", "", "d")[2], problem="torch sees no GPU")
    assert disagreement([*ranks("a", "b"), refused]) == "rank 2 on n2: torch sees no GPU"


def answers(world_size: int, local_ranks: int) -> list[object]:
    """The device of each rank, or what refused it; ranks are threads with one store."""
    store = dist.HashStore()

    def answer(rank: int) -> object:
        try:
            return agreed_device(rank_env(rank, world_size, local_ranks), store)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(answer, range(world_size)))


def busy(*_: object) -> None:
    raise getattr(torch, "AcceleratorError", RuntimeError)(  # since torch 2.8
        "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be "
        "asynchronously reported at some other API call"
    )


def test_all_ranks_hear_that_two_share_a_gpu(gpus, monkeypatch):
    """Also where a GPU serves one process alone: no rank takes its GPU before."""
    gpus("a", "b")
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    (heard,) = set(answers(world_size=3, local_ranks=3))
    assert heard == (
        "ranks 0, 2 on n1 share one GPU, but each needs its own; set tasks_per_node in the profile "
        "to gpus_per_node"
    )


def test_ranks_that_see_one_gpu_each_take_it(gpus, monkeypatch):
    """A launcher that binds GPUs to tasks shows each rank its own as the first."""
    gpus("a")
    first = own_device(rank_env(1), {})
    assert first.index == 0
    seen = {rank: RankDevice("n1", uuid) for rank, uuid in enumerate("ab")}
    monkeypatch.setattr(devices, "_looked_at", lambda env: (first, seen[env.rank]))
    assert answers(world_size=2, local_ranks=2) == [first, first]


def test_all_ranks_hear_of_the_one_that_cannot_use_its_gpu(monkeypatch):
    def look(env: RankEnv) -> torch.device:
        if env.rank == 1:
            raise devices.DeviceError("torch has no kernels")
        return torch.device("cpu")

    monkeypatch.setattr(devices, "own_device", look)
    assert answers(world_size=3, local_ranks=1) == ["rank 1 on n2: torch has no kernels"] * 3


@pytest.mark.parametrize("where", ["get_device_capability", "get_device_properties", "set_device"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_hear_in_one_line_of_the_gpu_that_cuda_refuses(
    gpus, monkeypatch, where, world_size
):
    gpus("a", "b")
    working = getattr(torch.cuda, where)
    last = world_size - 1
    monkeypatch.setattr(torch.cuda, where, lambda d: busy() if d.index == last else working(d))
    (heard,) = set(answers(world_size, local_ranks=2))
    assert heard == (
        f"rank {last} on n1: CUDA error: all CUDA-capable devices are busy or unavailable; see "
        "`nvidia-smi` on this node"
    )


def test_each_rank_takes_the_gpu_on_which_all_agreed(gpus, monkeypatch):
    gpus("a", "b")
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    agreed = answers(world_size=2, local_ranks=2)
    assert agreed == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert sorted(taken, key=str) == agreed
