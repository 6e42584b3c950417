"""What a cluster gives: files, ranks, queues."""

from hpc.account import stand_in

stand_in()
