"""Run tests in a process whose kernels come from a library of the caller's choice.

python -m tests.attention.amx.child LIBRARY TRAP ARGUMENT...   (TRAP "-": the processor's own AMX)
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from resformer_kernels._core import extension


def main() -> int:
    library, trap, *arguments = sys.argv[1:]
    extension.LIBRARY = Path(library)
    emulator = None if trap == "-" else ctypes.CDLL(trap)
    if emulator is not None and emulator.amx_emulate() != 0:
        raise OSError("no handler of SIGILL could be set")
    # Pytest's own handler of SIGILL would take the emulator's place.
    status = pytest.main(["-p", "no:faulthandler", "-p", "no:cacheprovider", "-n", "0", *arguments])
    if emulator is not None:
        count = ctypes.c_int64(emulator.amx_emulated()).value
        sys.stdout.write(f"emulated instructions: {count}\n")
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
