"""What the kernels of the built CUDA library use, read from its machine code.

With the cuobjdump of Triton's package; no GPU takes part, and nothing is compiled.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection
from pathlib import Path

from resformer_kernels._core import extension as _extension
from resformer_kernels.cli.compile.artifacts import Compiled

_ARCHITECTURE = re.compile(r"^arch = sm_(\d+)", re.MULTILINE)
_FUNCTION = re.compile(
    r"^ Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE
)
_SOURCE = re.compile(r"_\d+_(\w+)_cuda_cu_")


def kernels(
    ops: Collection[str], capabilities: Collection[int], library: Path | None = None
) -> list[Compiled]:
    """A case for each kernel and architecture, its instances taken together: the most that one
    of them uses. None may use local memory. None at all where the library is not built.

    Shared memory is what the kernel declares: what a launch asks for besides is not known here.
    """
    library = _extension.CUDA_LIBRARY if library is None else library
    return read(_usage(library), ops, capabilities) if library.exists() else []


def _usage(library: Path) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(usage: str, ops: Collection[str], capabilities: Collection[int]) -> list[Compiled]:
    """The cases of what cuobjdump printed."""
    instances: dict[tuple[str, int, str], list[tuple[int, int, int]]] = {}
    _, *parts = _ARCHITECTURE.split(usage)
    for capability, text in zip(map(int, parts[::2]), parts[1::2], strict=True):
        for symbol, *numbers in _FUNCTION.findall(text):
            op, kernel = _kernel(symbol)
            registers, stack, shared, local = map(int, numbers)
            if op in ops and capability in capabilities:
                found = instances.setdefault((op, capability, kernel), [])
                found.append((registers, stack + local, shared))
    return [_case(key, found) for key, found in sorted(instances.items())]


def _kernel(symbol: str) -> tuple[str, str]:
    """(op, function) of a mangled name, in which every part follows its length."""
    parts, rest = [], symbol.removeprefix("_ZN")
    for _ in range(3):
        length = re.match(r"\d+", rest)
        if length is None:
            raise RuntimeError(f"not a kernel of a *_cuda.cu file: {symbol}")
        rest = rest[length.end() :]
        parts.append(rest[: int(length[0])])
        rest = rest[int(length[0]) :]
    source = _SOURCE.search(parts[1])
    if source is None:
        raise RuntimeError(f"not a kernel of a *_cuda.cu file: {symbol}")
    return source[1], parts[2]


def _case(key: tuple[str, int, str], found: list[tuple[int, int, int]]) -> Compiled:
    op, capability, kernel = key
    registers, local_bytes, shared_bytes = (max(numbers) for numbers in zip(*found, strict=True))
    spilling = sum(1 for _, local, _ in found if local)
    problems = (f"{spilling} use up to {local_bytes} bytes of local memory",) if spilling else ()
    return Compiled(
        op,
        f"CUDA C++, {kernel}, {len(found)} forms",
        capability,
        True,
        problems,
        registers=registers,
        local_bytes=local_bytes,
        local_accesses=spilling,
        shared_bytes=shared_bytes,
    )
