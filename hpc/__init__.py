"""Use a cluster: crash-safe files, ranks, job queues. Knows nothing of segmentation."""

from hpc.account import ensure_account

ensure_account()
