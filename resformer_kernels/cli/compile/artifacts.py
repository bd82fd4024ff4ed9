"""What a compiled Triton kernel uses: registers, local and shared memory, matrix instructions.

Read from the compiler's metadata, the PTX and the machine code, with the cuobjdump and nvdisasm of
Triton's package. No GPU takes part.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resformer_kernels._triton.arch import ARCHITECTURES, WARP
from resformer_kernels._triton.cases import CompileCase

_MATRIX_INSTRUCTIONS = {
    "wgmma": re.compile(r"\bwgmma\.mma_async"),
    "tcgen05": re.compile(r"\btcgen05\.mma"),
    "mma.sync": re.compile(r"\b(?:mma\.sync|wmma\.mma)"),
}
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
_LOCAL_ACCESS = re.compile(r"\b(?:STL|LDL)(?:\.[\w.]+)? ")
_SERIALIZED = "wgmma.mma_async instructions are serialized"
_TELLING = re.compile(r"\w*Error\(|error:|fatal\s+:")
_BRIEF = 300


@dataclass(frozen=True)
class Compiled:
    """What one case became on one architecture."""

    op: str
    name: str
    capability: int
    main: bool = False
    problems: tuple[str, ...] = ()
    """What the check fails on; none: the case passed."""
    seconds: float = 0.0
    threads: int = 0
    registers: int = 0
    local_bytes: int = 0
    """Of local memory a thread: spilled registers and arrays that are not in registers."""
    local_accesses: int = 0
    """Instructions that read or write local memory."""
    shared_bytes: int = 0
    tensor_memory: int = 0
    """Columns; 0 before capability 100."""
    matrix: tuple[str, ...] = ()
    """Matrix instructions among "wgmma", "tcgen05", "mma.sync"."""

    @property
    def ok(self) -> bool:
        """Whether the check found nothing wrong."""
        return not self.problems


def build(op: str, case: CompileCase, capability: int, cache: Path) -> Compiled:
    """Compile `case` and judge it. What the compiler refuses is a problem like any other.

    `cache` is Triton's cache folder; the assembler's log of each kernel is kept there too.
    """
    import triton

    start = time.perf_counter()
    try:
        artifact, log = _compile(case, capability, cache)
    except (triton.TritonError, RuntimeError) as error:
        problem = f"does not compile: {_brief(str(error))}"
        return Compiled(op, case.name, capability, case.main, (problem,))
    cubin: bytes = artifact.asm["cubin"]
    ptx: str = artifact.asm["ptx"]
    registers, local_bytes, local_accesses = _read_machine_code(cubin)
    used: dict[str, Any] = {
        "local_bytes": local_bytes,
        "local_accesses": local_accesses,
        "shared_bytes": int(artifact.metadata.shared),
        "tensor_memory": int(artifact.metadata.tmem_size or 0),
        "matrix": tuple(name for name, sign in _MATRIX_INSTRUCTIONS.items() if sign.search(ptx)),
    }
    return Compiled(
        op,
        case.name,
        capability,
        case.main,
        tuple(_problems(case, capability, serialized=_SERIALIZED in log, **used)),
        time.perf_counter() - start,
        case.num_warps * WARP,
        registers,
        **used,
    )


def _compile(case: CompileCase, capability: int, cache: Path) -> tuple[Any, str]:
    """(Triton's compiled kernel, the assembler's log)."""
    import triton
    from triton.backends.compiler import GPUTarget

    printed = io.StringIO()
    with triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = str(cache)
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(printed):
            artifact = triton.compile(
                _source(case),
                target=GPUTarget("cuda", capability, WARP),
                options={
                    "num_warps": case.num_warps,
                    "num_stages": case.num_stages,
                    **case.options,
                },
            )
    kept = cache / f"{artifact.hash}.log"
    if printed.getvalue():
        kept.write_text(printed.getvalue())
    return artifact, kept.read_text() if kept.exists() else ""


def _source(case: CompileCase) -> Any:
    if case.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(case.kernel, case.signature, case.constants, case.attrs)
    from triton.compiler import ASTSource

    return ASTSource(case.kernel, case.signature, case.constants, case.attrs)


def _brief(message: str) -> str:
    """What an error of the compiler says, less the program that it quotes."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)] or lines
    return "; ".join(telling)[:_BRIEF]


def _read_machine_code(cubin: bytes) -> tuple[int, int, int]:
    """(registers, bytes of local memory, accesses to local memory)."""
    import triton

    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _output(tools.cuobjdump.path, "-res-usage", str(path))
        code = _output(tools.nvdisasm.path, "-c", str(path))
    found = _RESOURCES.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no resources: {usage!r}")
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local, len(_LOCAL_ACCESS.findall(code))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _problems(
    case: CompileCase,
    capability: int,
    *,
    serialized: bool,
    local_bytes: int,
    local_accesses: int,
    shared_bytes: int,
    tensor_memory: int,
    matrix: tuple[str, ...],
) -> list[str]:
    found = []
    if case.main and local_accesses:
        found.append(f"{local_accesses} accesses to {local_bytes} bytes of local memory a thread")
    _, shared_limit, tensor_limit = ARCHITECTURES[capability]
    if shared_bytes > shared_limit:
        found.append(f"{shared_bytes} bytes of shared memory, over the limit of {shared_limit}")
    if tensor_memory > tensor_limit:
        found.append(f"{tensor_memory} columns of tensor memory, over {tensor_limit}")
    if case.expects_mma and capability == 90 and "wgmma" not in matrix:
        found.append("no wgmma")
    elif case.expects_mma and not matrix:
        found.append("no matrix instruction")
    if case.main and serialized:
        found.append("the assembler serialises its wgmma instructions")
    return found
