"""The CRC32 of bytes, as zlib, PNG and Ethernet have it, by the fastest way that is installed."""

from __future__ import annotations

try:
    # by the processor's carry-less multiplication: ten times as fast as zlib's, whose checks would
    # cost more than all else of reading
    from isal.isal_zlib import crc32
except ImportError:  # it has no wheel for this machine; the numbers are the same
    from zlib import crc32

__all__ = ["crc32"]
