"""Choose the GPU of each rank, and refuse devices that do not go together before any collective."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from hpc.cli import UserError
from hpc.distributed.launcher import RankEnv

_GRANTS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES")
_HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES; the last one is Slurm's
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)(\w?)")
_READING = timedelta(seconds=10)


class DeviceError(UserError):
    """The devices of the ranks cannot be used."""


@dataclass(frozen=True)
class RankDevice:
    """The device of a rank: `cpu`, UUID and model of its GPU, or the reason why it has none."""

    node: str
    device: str = ""
    problem: str = ""
    model: str = ""


def agreed_device(env: RankEnv, store: dist.Store) -> torch.device:
    """Return this rank's device after all ranks have compared theirs through `store`.

    Raises:
        DeviceError: on all ranks, if one cannot use its device, two share a GPU, only some have
            one, or their GPUs are of different models.
    """
    device, mine = _looked_at(env)
    _compare(env, store, "found", mine)
    assert device is not None
    # only now: a GPU in exclusive mode refuses the second of two ranks that share it
    _compare(env, store, "taken", _taken(device, mine))
    return device


def _looked_at(env: RankEnv) -> tuple[torch.device | None, RankDevice]:
    """Return this rank's device and its description, without a context on a GPU."""
    try:
        device = own_device(env)
        if device.type == "cpu":
            return device, RankDevice(env.node, "cpu")
        found = torch.cuda.get_device_properties(device)
    except DeviceError as error:
        return None, RankDevice(env.node, problem=str(error))
    except Exception as error:  # torch wraps CUDA's errors in types of its own
        return None, RankDevice(env.node, problem=_of_cuda(error))
    return device, RankDevice(env.node, str(found.uuid), model=found.name)


def _taken(device: torch.device, mine: RankDevice) -> RankDevice:
    """Make `device` torch's current one; return `mine`, with the problem if CUDA refuses."""
    if device.type == "cpu":
        return mine
    try:
        torch.cuda.set_device(device)
    except Exception as error:
        return replace(mine, problem=_of_cuda(error))
    return mine


def _of_cuda(error: Exception) -> str:
    """Return the first line of CUDA's error; those after it are hints for debuggers."""
    first, *_ = str(error).splitlines() or [type(error).__name__]
    return f"{first}; see `nvidia-smi` on this node"


def _compare(env: RankEnv, store: dist.Store, what: str, mine: RankDevice) -> None:
    """Raise `DeviceError` on all ranks if their descriptions do not go together."""
    store.set(_key(what, env.rank), json.dumps(asdict(mine)))
    texts = store.multi_get([_key(what, rank) for rank in range(env.world_size)])
    if problem := disagreement([RankDevice(**json.loads(text)) for text in texts]):
        _await_readers(env, store)
        raise DeviceError(problem)


def _await_readers(env: RankEnv, store: dist.Store) -> None:
    """Keep rank 0's store until all ranks know what it holds."""
    store.set(_key("read", env.rank), "")
    if env.rank == 0:
        with suppress(RuntimeError):  # a rank died meanwhile
            store.wait([_key("read", rank) for rank in range(env.world_size)], _READING)


def _key(what: str, rank: int) -> str:
    return f"lossgrid-{what}-{rank}"


def disagreement(ranks: Sequence[RankDevice]) -> str:
    """Return why ranks, in order of their number, cannot work together; "" if they can."""
    for number, rank in enumerate(ranks):
        if rank.problem:
            return f"rank {number} on {rank.node}: {rank.problem}"
    on_device = _numbers_by(lambda rank: rank.device, ranks)
    on_cpu = on_device.pop("cpu", [])
    if on_cpu and on_device:
        with_gpu = [number for numbers in on_device.values() for number in numbers]
        return (
            f"torch sees no GPU for {_named(on_cpu, ranks)}, but one for "
            f"{_named(sorted(with_gpu), ranks)}; exclude the node in the profile, or ask for GPUs "
            "on all nodes (gpus_per_node)"
        )
    for sharing in on_device.values():
        if len(sharing) > 1:
            return (
                f"{_named(sharing, ranks)} share one GPU, but each needs its own; set "
                "tasks_per_node in the profile to gpus_per_node"
            )
    of_model = _numbers_by(lambda rank: rank.model, ranks)
    if len(of_model) > 1:
        have = ", ".join(f"{_named(who, ranks)}: {model}" for model, who in of_model.items())
        return (
            f"the ranks have different GPUs ({have}), which may round differently; choose one "
            "model by constraint, gres or exclude in the profile"
        )
    return ""


def _numbers_by(
    key: Callable[[RankDevice], str], ranks: Sequence[RankDevice]
) -> dict[str, list[int]]:
    numbers = defaultdict[str, list[int]](list)
    for number, rank in enumerate(ranks):
        numbers[key(rank)].append(number)
    return numbers


def _named(numbers: Iterable[int], ranks: Sequence[RankDevice]) -> str:
    """Return `rank 2 on n1` or `ranks 2, 3 on n1, n2`."""
    found = list(numbers)
    nodes = ", ".join(dict.fromkeys(ranks[number].node for number in found))
    return f"rank{'s' * (len(found) > 1)} {', '.join(map(str, found))} on {nodes}"


def own_device(env: RankEnv, environ: Mapping[str, str] = os.environ) -> torch.device:
    """Return this rank's GPU, or the CPU if there is none.

    Raises:
        DeviceError: GPUs were granted and torch sees none, or torch has no kernels for the GPU.
        RuntimeError: CUDA does not start.
    """
    if not torch.cuda.is_available():
        _refuse_granted(environ)
        return torch.device("cpu")
    # a launcher shows each rank all GPUs of the node, or its own alone
    device = torch.device("cuda", env.local_rank % torch.cuda.device_count())
    _require_kernels(device)
    return device


def _refuse_granted(environ: Mapping[str, str]) -> None:
    if grant := granted_gpus(environ):
        raise DeviceError(
            f"the job has GPUs ({grant}), but torch {torch.__version__} sees none; install a build "
            "of torch for a CUDA that the node's driver supports (`nvidia-smi`); to compute on "
            "CPUs, set gpus_per_node = 0 in the profile, or CUDA_VISIBLE_DEVICES= outside a job"
        )


def granted_gpus(environ: Mapping[str, str]) -> str:
    """Return the variable by which Slurm or the local queue grants GPUs; "" if there is none.

    A user who hides all GPUs with an empty CUDA_VISIBLE_DEVICES wants the CPU.
    """
    if environ.get("CUDA_VISIBLE_DEVICES", "unset") in _HIDDEN:
        return ""
    given = [f"{name}={environ[name]}" for name in _GRANTS if environ.get(name)]
    return next((grant for grant in given if grant != "SLURM_GPUS_ON_NODE=0"), "")


def _require_kernels(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    architectures = torch.cuda.get_arch_list()
    if not has_kernels(architectures, capability):
        major, minor = capability
        raise DeviceError(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} "
            f"(sm_{major}{minor}), only {', '.join(architectures)}; install a build that has them "
            "(for V100 the wheels for CUDA 12.6, or the default ones up to torch 2.10)"
        )


def has_kernels(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Return whether a build for `architectures` runs on a GPU of the compute capability.

    Machine code (`sm_XY`) runs on the same major version, from its minor version on. The driver
    compiles PTX (`compute_XY`) for the same and all newer GPUs. Code for one architecture alone
    (`sm_90a`) runs nowhere else. Source: CUDA C++ Programming Guide, sections "Binary
    Compatibility", "PTX Compatibility" and "Feature Set Compiler Targets".
    """
    for match in filter(None, map(_ARCHITECTURE.fullmatch, architectures)):
        kind, built, alone = match[1], (int(match[2]), int(match[3])), match[4]
        if built == capability:
            return True
        if not alone and built < capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False
