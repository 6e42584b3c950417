"""Freed memory is kept for the next step and does not go back to the kernel."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

# Prints the page faults of each of five steps, which allocate, write and free 64 MB.
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


def test_steps_after_the_first_map_no_pages():
    assert pages_of_five_steps("assert keep_freed_memory()") < 100


def test_without_the_setting_each_step_maps_its_pages_again():
    """Show that the test above measures something."""
    assert pages_of_five_steps("") > 1000
