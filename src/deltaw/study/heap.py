"""What malloc does with memory that was freed. Knows nothing of tensors.

glibc gives large pieces back to the system, and a program that asks for them anew waits for each page. Whether it does depends on
what else lies in the heap: with the originals of a merged model there (540 MB), passes over 8 rows of 256 tokens took up to a
fifth longer, all of it page faults, by the same kernels on the same shapes. A comparison of times must not be one of heaps.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

# malloc.h: what the settings are called
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# What glibc's own rule ends at in a program that frees large pieces, and its default (mallopt(3))
_LARGEST, _MAPS = 32 << 20, 65536


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """In this block nothing that is freed goes back to the system, so that it is there for what comes next. Elsewhere than with
    glibc it changes nothing."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _MAPS)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # no library goes without a name there (Windows)
        return None
