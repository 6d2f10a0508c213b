"""The C library's allocator, told to keep the memory that one block frees for the next one.

By default glibc returns large pieces to the system and gets them back page by page, zeroed: 4 of
the 50 seconds of a run were spent so. Elsewhere than on glibc these functions do nothing.
"""

import ctypes
import platform
from functools import cache

# From malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
KEPT = 1 << 30


def keep() -> None:
    """Keep up to 1 GiB of what is freed; for a process that is prunekit's own."""
    if library := _glibc():
        library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        library.mallopt(TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Return to the system what is free now: after something large that does not come again."""
    if library := _glibc():
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
