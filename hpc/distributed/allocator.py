"""Tell the C library to keep freed memory."""

from __future__ import annotations

import ctypes

# mallopt's parameters, from glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later allocations of this process.

    The process never shrinks from then on. Without this, glibc returns large blocks to the kernel,
    and each training step maps, zeroes and faults in its gigabytes again, page by page.

    Returns:
        False if the C library is not glibc; then nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # M_MMAP_THRESHOLD would not do: before glibc 2.35 its maximum is 32 MB
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
