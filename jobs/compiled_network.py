"""`compile = true`: networks in training as torch.compile has them.

Losses stay as they are, and so does evaluation, where every picture may have a size of its own: it
takes the module itself, whose state is the same.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import exc as failures

from hpc.command import UserError, one_line
from hpc.preempt import stop_signals_kept_from_children
from hpc.private import private_folder
from jobs.protocol import Protocol

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def require_compiler(protocol: Protocol, device: torch.device, ranks: int = 1) -> None:
    """Prepare this process, one of `ranks`, for `training_form`. Raises `UserError` if it would not
    work on `device`, where an addition is compiled (on a processor torch takes a C++ compiler and
    Python's headers, on a GPU Triton and a C compiler), or if ranks have unequal shares of a batch.
    Nothing happens where nothing is to be compiled."""
    if not protocol.compile:
        return
    protocol.require_even_shares(ranks)
    if protocol.deterministic and device.type == "cuda" and not _keeps_its_choices():
        raise UserError(
            "compile = true with deterministic = true needs a torch later than "
            f"{torch.__version__}, which takes on a GPU whatever code is faster just then; set one "
            "of them to false"
        )
    keep_privately()
    try:
        with stop_signals_kept_from_children():
            _compiled(_one_more, protocol)(torch.zeros(2, device=device))
    except Exception as error:  # torch, its compilers and the driver raise what they like
        needed = "Triton and a C compiler" if device.type == "cuda" else "g++ and Python's headers"
        raise UserError(
            f"compile = true does not work here ({_reason(error)}); see that the nodes have "
            f"{needed} (setup in the profile), or set compile = false in [protocol]"
        ) from error


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}".strip().partition("\n")[0])


def _keeps_its_choices() -> bool:
    return "deterministic" in torch._inductor.list_options()


def keep_privately() -> None:
    """Have torch keep what it compiles, which is run later, where nobody else can write: in one of
    the node's temporary folders, or in what TORCHINDUCTOR_CACHE_DIR names. Raises `UserError` if
    others can write there."""
    own = Path(tempfile.gettempdir()) / f"lossgrid-compiled-{os.geteuid()}"
    folder = os.environ.setdefault(_CACHE, str(own))
    private_folder(folder, remedy=f"set {_CACHE} to a folder of yours on the node")


def training_form(module: nn.Module, protocol: Protocol) -> nn.Module:
    """`module` for training, which compiles itself at its first call if the protocol says so. It
    shares all state with `module`. Inputs have one shape throughout; further modules of the same
    kind, with inputs of that shape, run the same code and so have the same bits."""
    if not protocol.compile:
        return module
    form: nn.Module = _compiled(module, protocol)
    return form


@contextmanager
def while_compiling(protocol: Protocol) -> Iterator[None]:
    """The block in which a network compiles itself, at its first step. The compilers are children
    of this process, and a stop is none of their business. Raises `UserError` where they fail."""
    if not protocol.compile:
        yield
        return
    try:
        with stop_signals_kept_from_children():
            yield
    except (failures.TorchDynamoException, failures.FailOnRecompileLimitHit) as error:
        raise UserError(
            f"torch.compile failed ({_reason(error)}); see that the node has memory and, in its "
            "temporary folder, room, and submit again to go on from the last checkpoint; or set "
            "compile = false in [protocol]"
        ) from error


def _compiled(plain: Callable[..., Any], protocol: Protocol) -> Any:
    # ranks of a node compile beside each other
    torch._inductor.config.compile_threads = protocol.threads
    # it would cut networks into buckets; a backward pass does not wait for an exchange anyway
    torch._dynamo.config.optimize_ddp = False
    options: dict[str, Any] = {
        # the code for the processor holds their number, which torch's cache would not look at
        "cpp.threads": protocol.threads,
        # jobs.models.layout decides it; torch would lay weights out anew at each step
        "layout_optimization": False,
    }
    if protocol.deterministic and _keeps_its_choices():
        options["deterministic"] = True
    # the whole network or an error: never in parts, and never back to the plain way unnoticed
    return torch.compile(plain, fullgraph=True, dynamic=False, options=options)


def _one_more(x: torch.Tensor) -> torch.Tensor:
    return x + 1
