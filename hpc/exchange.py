"""The mean of all ranks' gradients, which are exchanged while a rank does something else.

DistributedDataParallel by itself waits for it at the end of each backward pass.
"""

# no annotations as strings: torch compares those of its hooks with its classes

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from hpc.distributed.process_group import COMMUNICATION, Group


class Exchange:
    """The all-reduces that a backward pass through `parallel` begins. Its gradients, views of its
    buckets, are the means after `wait`, with the bits that it gives by itself.

    The buckets have a process group of their own: in the module's they would stand before the
    collectives of whatever runs next, and before what the module waits for in each pass, which
    parameters the ranks have used.
    """

    def __init__(self, parallel: DistributedDataParallel, group: Group) -> None:
        self._group = group
        self._process_group = group.background if group.world_size > 1 else None
        self._started: list[dist.Work] = []
        parallel.register_comm_hook(self, Exchange._start)

    def _start(self, bucket: dist.GradBucket) -> Future[Tensor]:
        gradients = bucket.buffer()
        if self._process_group is not None:
            gradients.mul_(1.0 / self._group.world_size)
            work = dist.all_reduce(gradients, group=self._process_group, async_op=True)
            assert work is not None
            self._started.append(work)
        on_gpu = gradients.device.type == "cuda"
        passed: Future[Tensor] = torch.futures.Future(devices=[gradients.device] if on_gpu else [])
        passed.set_result(gradients)  # the module sees that these are its own, and copies nothing
        return passed

    def wait(self) -> None:
        """Wait until what the last backward pass began is done; on a GPU its stream waits."""
        with self._group.watch.part(COMMUNICATION):
            for work in self._started:
                work.wait()
        self._started.clear()
