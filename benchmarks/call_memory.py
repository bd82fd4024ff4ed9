"""The memory that one call takes, in this process."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def resident(field: str) -> int:
    """Bytes of "VmRSS" (now) or "VmHWM" (at most, since `reset_peak`) of this process."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


def reset_peak() -> None:
    """Let "VmHWM" begin anew. OSError where the system does not allow it."""
    _CLEAR.write_text(_RESET_PEAK)


def unavailable_reason() -> str | None:
    """Why peak memory cannot be measured here; None: it can."""
    if sys.platform != "linux" or not _CLEAR.exists():
        return f"{_CLEAR} does not exist: peak memory is read from Linux's /proc"
    try:
        reset_peak()
    except OSError as error:
        return f"{_CLEAR} cannot be written: {error}"
    return None


def peak_call_bytes(call: Callable[[], object]) -> int:
    """Resident memory at the peak of one call, its result included, less that before it.

    What earlier calls freed is given back to the system first: where it cannot be (another C
    library than GNU's), reused blocks go uncounted. Scratch that a library keeps between calls is
    there before, and is not counted.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    reset_peak()
    before = resident("VmRSS")
    result = call()
    peak = resident("VmHWM")
    del result
    return max(0, peak - before)
