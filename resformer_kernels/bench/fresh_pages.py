"""Pages that a process touches for the first time, and how to touch few of them while timing.

glibc returns a freed block of 32 MiB or more to the system, so that an op pays for its output's
pages at every call: many times the cost of writing them, above all on a virtual machine whose host
has taken the memory back. The system is then timed instead of the op. Large arrays of an
application live longer than a call, or come from an allocator that keeps them.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

if sys.platform != "win32":
    import resource

FEW = 64
"""Pages (256 KiB where they have 4 KiB) that do not count as a fresh output."""

# From glibc's malloc.h, with its defaults.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536


def touched() -> int:
    """Fresh pages this process has been given so far, by all its threads; 0 on Windows.

    A large page counts as one.
    """
    if sys.platform == "win32":
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Within it, freed memory stays with the process, and the next allocation reuses it.

    Equals starting the process with MALLOC_MMAP_MAX_=0 and a large MALLOC_TRIM_THRESHOLD_. The
    first few calls still make blocks of the sizes they need: a small allocation can land in a large
    block. At the end glibc's defaults return, and free memory goes back to the system.

    Yields:
        Whether memory is kept, which needs glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    libc = ctypes.CDLL(None)
    # -1 is the largest size: never trim.
    kept = bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, -1))
    try:
        yield kept
    finally:
        libc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        libc.malloc_trim(0)
