"""What a cluster gives: files, ranks, queues."""

from hpc.account import ensure_account

ensure_account()
