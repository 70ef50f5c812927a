"""What a process does with the memory that it frees."""

import ctypes
import sys

# Names and numbers of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has the C library of Linux keep freed memory for the next array, and says whether it does.

    XLA on a CPU allocates every result and every program's working memory anew. Given back to the system and fetched
    again, pages are first filled with zeros, one fault each, which costs large arrays more than the arithmetic does.
    The process then never shrinks below its peak. Call it before JAX starts its threads; elsewhere it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_ARENA_MAX, 1)])
