"""What the C library does with memory that a program frees."""

from __future__ import annotations

import ctypes

# mallopt's parameters, from glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for what this process allocates next; from then on the process
    stays as large as it ever was. False where the C library is another one and nothing changes.

    Otherwise large blocks go back to the kernel as they are freed, and every step of a training
    has its gigabytes mapped, zeroed and faulted in anew, page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # not M_MMAP_THRESHOLD: before glibc 2.35 it takes no more than 32 MB
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
