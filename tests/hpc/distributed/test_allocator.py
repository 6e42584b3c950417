"""Freed memory is kept for the next step instead of going back to the kernel."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

# Pages that the kernel had to bring in, while five times 64 MB are taken, written and freed.
STEPS = """
import resource
from hpc.distributed.allocator import keep_freed_memory

def step():
    for size in (64, 40, 24):
        bytearray(size * 2**20)

{first}
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_of_five_steps(first: str) -> int:
    program = STEPS.format(first=first)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return int(done.stdout)


def test_steps_after_the_first_bring_in_no_pages():
    assert pages_of_five_steps("assert keep_freed_memory()") < 100


def test_without_it_each_brings_in_its_own_again():
    """The number that the test above is about: were it small here too, nothing would be shown."""
    assert pages_of_five_steps("") > 1000
