"""torch's compilers in tests: kept apart from what jobs on this machine keep, or missing."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch


def compile_into(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """What torch compiles from now on it keeps in `folder`, and what it has compiled is
    forgotten."""
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.reset()
    torch._inductor.utils.clear_inductor_caches()


@contextmanager
def no_compiler(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """As on a node without a C++ compiler, where nothing is kept yet."""
    compile_into(patch, folder)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


def alone(work: Callable[..., Any], *arguments: object) -> Any:
    """`work` in a process of its own, whatever it raises: after a compilation that failed, torch's
    hook stays where Python calls functions, and arguments live longer."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def without_compiler(folder: Path, work: Callable[..., Any], *arguments: object) -> Any:
    """`work` as on a node that `no_compiler` describes; to be called `alone`."""
    with pytest.MonkeyPatch.context() as patch, no_compiler(patch, folder):
        return work(*arguments)


def num_compiled() -> int:
    """How many graphs have been compiled since this process began."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
