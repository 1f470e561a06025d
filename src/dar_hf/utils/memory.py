"""What a process does with memory that it has freed."""

import ctypes
import sys

# parameters of glibc's mallopt (malloc.h)
TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_THRESHOLD = -3
LARGEST_MMAP_THRESHOLD = 1 << 25  # that glibc takes
AT_ONCE = 1 << 28  # bytes to ask the system for: a few times what a step of a small model allocates


def keep_freed_memory() -> bool:
    """Let the process keep memory that it frees, up to its peak, for what it allocates next; returns whether it will.

    A training step on a CPU allocates hundreds of large tensors and frees them again. glibc gives such memory back to
    the system, whose fresh pages are then filled with zeros one by one, at the cost of a tenth of the step. For
    commands, since it concerns the whole process. Does nothing with other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {MMAP_THRESHOLD: LARGEST_MMAP_THRESHOLD, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: AT_ONCE}
    return all(mallopt(name, value) for name, value in settings.items())
