"""The settings of torch that bits depend on, for training, evaluation and prediction."""

from __future__ import annotations

import os

import torch

from hpc.distributed.allocator import keep_freed_memory
from jobs.spec.protocol import Protocol


def configure_torch(protocol: Protocol) -> None:
    """Set threads, determinism and precision by `protocol`, overriding the node's defaults.

    The process also keeps freed memory from step to step, which changes no bit.
    """
    keep_freed_memory()
    torch.set_num_threads(protocol.threads)
    if protocol.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without it
        # sums in the switch between GPUs, whose order of additions nothing fixes
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.use_deterministic_algorithms(protocol.deterministic)
    # deterministic algorithms would also fill each new tensor of `torch.empty` with NaN, one more
    # pass over its memory; a program that reads no such memory has the same bits without
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # the module's type lacks it
    # torch's default for convolutions on a GPU is TF32, with 10 bits of precision
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
