"""The settings of torch in a process that trains, evaluates or predicts: bits depend on them."""

from __future__ import annotations

import os

import torch

from hpc.distributed.allocator import keep_freed_memory
from jobs.spec.protocol import Protocol


def configure_torch(protocol: Protocol) -> None:
    """Set threads, determinism and precision as `protocol` says, not as the node happens to have
    them. Memory is kept from step to step, which changes no bit."""
    keep_freed_memory()
    torch.set_num_threads(protocol.threads)
    if protocol.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without it
    torch.use_deterministic_algorithms(protocol.deterministic)
    # fp32 is fp32 on every GPU: torch's own choice for convolutions is TF32, of 10 bits
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
