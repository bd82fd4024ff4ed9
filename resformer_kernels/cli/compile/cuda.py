"""Resources of the built CUDA library's kernels, read from its machine code.

cuobjdump comes with Triton's package; no GPU is needed, and nothing is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from resformer_kernels._core import extension
from resformer_kernels.cli.compile.artifacts import Compiled, printed_by

_ARCHITECTURE = re.compile(r"^arch = sm_(\d+)", re.MULTILINE)
_FUNCTION = re.compile(
    r"^ Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE
)
_SOURCE = re.compile(r"_\d+_(\w+)_cuda_cu_")


def kernels(
    ops: Collection[str], capabilities: Collection[int], library: Path | None = None
) -> list[Compiled]:
    """A case for each kernel and architecture, with the largest use among its instances.

    None of them may use local memory. Empty where the library is not built. Shared memory is what
    the kernel declares: dynamic shared memory is chosen at a launch.
    """
    import triton

    library = extension.CUDA_LIBRARY if library is None else library
    if not library.exists():
        return []
    usage = printed_by(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(library))
    return read(usage, ops, capabilities)


def read(usage: str, ops: Collection[str], capabilities: Collection[int]) -> list[Compiled]:
    """The cases in the output of cuobjdump."""
    instances: dict[tuple[str, int, str], list[tuple[int, int, int]]] = {}
    _, *parts = _ARCHITECTURE.split(usage)
    for capability, text in zip(map(int, parts[::2]), parts[1::2], strict=True):
        for symbol, *numbers in _FUNCTION.findall(text):
            op, kernel = _kernel(symbol)
            registers, stack, shared, local = map(int, numbers)
            if op in ops and capability in capabilities:
                found = instances.setdefault((op, capability, kernel), [])
                found.append((registers, stack + local, shared))
    return [_case(*key, found) for key, found in sorted(instances.items())]


def _kernel(symbol: str) -> tuple[str, str]:
    """(op, function) of a mangled name, in which every part follows its length."""
    parts, rest = [], symbol.removeprefix("_ZN")
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        parts.append(rest[length.end() : end])
        rest = rest[end:]
    source = _SOURCE.search(parts[1]) if len(parts) > 2 else None
    if source is None:
        raise RuntimeError(f"not a kernel of a *_cuda.cu file: {symbol}")
    return source[1], parts[2]


def _case(op: str, capability: int, kernel: str, found: list[tuple[int, int, int]]) -> Compiled:
    registers, local_bytes, shared_bytes = map(max, zip(*found, strict=True))
    spilling = sum(local > 0 for _, local, _ in found)
    problem = f"{spilling} use up to {local_bytes} bytes of local memory"
    return Compiled(
        op,
        f"CUDA C++, {kernel}, {len(found)} forms",
        capability,
        main=True,
        problems=(problem,) if spilling else (),
        registers=registers,
        local_bytes=local_bytes,
        local_accesses=spilling,
        shared_bytes=shared_bytes,
    )
