"""glibc told to keep freed memory while a model trains.

By default malloc hands each large block back to the kernel when it is freed, and a training step frees and asks for the
same few blocks of 10 to 50 MB again and again: every page of them is then zeroed and mapped anew. Kept, they are not;
resident memory stays at a step's peak.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""mallopt's numbers, from malloc.h."""
_KEEP_BYTES = 2**31 - 1
_LARGEST_KEPT_BYTES = 256 * 2**20
"""Larger blocks, such as a copy of a table while a checkpoint is written, still go back at once."""
_DEFAULT_BYTES = 128 * 1024


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory stays with the process; afterwards it goes back. Nothing happens without glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _DEFAULT_BYTES)
        mallopt(_TRIM_THRESHOLD, _DEFAULT_BYTES)
        trim(0)
