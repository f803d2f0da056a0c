"""Heap settings for processes that move much data over SSH."""

import ctypes
from functools import cache
from typing import Final

_M_TOP_PAD: Final = -2  # <malloc.h>
_TOP_PAD_BYTES: Final = 16 * 1024 * 1024


@cache
def pad_heap() -> bool:
    """Keep 16 MiB at the top of the heap; once per process. False where libc has no mallopt.

    Copies of 128 to 256 KiB packets sit at glibc's trim threshold, so that each one maps, faults
    and unmaps memory: up to 3 CPU seconds per GB. Only this knob helps; the thresholds harm.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl, macOS
        return False
    return bool(mallopt(_M_TOP_PAD, _TOP_PAD_BYTES))
