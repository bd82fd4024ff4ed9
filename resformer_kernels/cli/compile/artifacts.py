"""Resources of a compiled Triton kernel: registers, local and shared memory, matrix instructions.

They are read from the compiler's metadata, the PTX and the machine code, with the cuobjdump and
nvdisasm of Triton's package. No GPU is needed.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resformer_kernels._triton.arch import ARCHITECTURES, is_amd
from resformer_kernels._triton.cases import CompileCase, gpu_target
from resformer_kernels.cli.compile.avoided import forms_to_avoid
from resformer_kernels.cli.compile.hazards import divergent_barriers
from resformer_kernels.cli.compile.pipelining import Distance, nearest_load
from resformer_kernels.cli.compile.reuse import early_writes

_MATRIX_INSTRUCTIONS = {
    "wgmma": re.compile(r"\bwgmma\.mma_async"),
    "tcgen05": re.compile(r"\btcgen05\.mma"),
    "mfma": re.compile(r"\bv_mfma_"),
    "mma.sync": re.compile(r"\b(?:mma\.sync|wmma\.mma)"),
}
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
_LOCAL_ACCESS = re.compile(r"\b(?:STL|LDL)(?:\.[\w.]+)? ")
_AMD_RESOURCES = re.compile(
    r"^ +\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)", re.MULTILINE
)
_SERIALIZED = "wgmma.mma_async instructions are serialized"
_TELLING = re.compile(r"\w*Error\(|error:|fatal\s+:")
_BRIEF = 300


@dataclass(frozen=True)
class Compiled:
    """One case, compiled for one architecture."""

    op: str
    name: str
    capability: int
    main: bool = False
    problems: tuple[str, ...] = ()
    """Reasons for the check to fail; empty where the case passed."""
    seconds: float = 0.0
    threads: int = 0
    registers: int = 0
    local_bytes: int = 0
    """Local memory of a thread: spilled registers and arrays that are not in registers."""
    local_accesses: int = 0
    """Instructions that read or write local memory."""
    shared_bytes: int = 0
    tensor_memory: int = 0
    """Columns; 0 before capability 100."""
    matrix: tuple[str, ...] = ()
    """Matrix instructions among "wgmma", "tcgen05", "mma.sync", "mfma"."""
    ahead: Distance | None = None
    """How far before its use the nearest load by tensor descriptor in a loop is issued."""

    @property
    def ok(self) -> bool:
        """Whether the check found nothing wrong."""
        return not self.problems


def build(op: str, case: CompileCase, capability: int, cache: Path) -> Compiled:
    """Compile `case` and judge it. A refusal of the compiler is a problem like any other.

    `cache` is Triton's cache folder; the assembler's log of each kernel is kept there too.
    """
    import triton

    start = time.perf_counter()
    try:
        artifact, log = _compile(case, capability, cache)
    except (triton.TritonError, RuntimeError) as error:
        problem = f"does not compile: {_brief(str(error))}"
        return Compiled(op, case.name, capability, case.main, (problem,))
    amd = is_amd(divmod(capability, 10))
    code: str = artifact.asm["amdgcn" if amd else "ptx"]
    registers, local_bytes, local_accesses = (
        _read_listing(code) if amd else _read_machine_code(artifact.asm["cubin"])
    )
    found = Compiled(
        op,
        case.name,
        capability,
        case.main,
        seconds=time.perf_counter() - start,
        threads=case.num_warps * ARCHITECTURES[capability].warp,
        registers=registers,
        local_bytes=local_bytes,
        local_accesses=local_accesses,
        shared_bytes=int(artifact.metadata.shared),
        tensor_memory=0 if amd else int(artifact.metadata.tmem_size or 0),
        matrix=tuple(name for name, sign in _MATRIX_INSTRUCTIONS.items() if sign.search(code)),
        ahead=None if amd else nearest_load(code),
    )
    problems = [
        *_problems(case, found, serialized=_SERIALIZED in log),
        *(() if amd else _hazards(case, capability, artifact)),
    ]
    return replace(found, problems=tuple(problems))


def _hazards(case: CompileCase, capability: int, artifact: Any) -> Iterator[str]:
    yield from divergent_barriers(artifact.asm["ptx"])
    yield from early_writes(artifact.asm["ptx"])
    yield from forms_to_avoid(capability, artifact.asm["ttgir"], case.num_warps, case.num_stages)


def _compile(case: CompileCase, capability: int, cache: Path) -> tuple[Any, str]:
    """(Triton's compiled kernel, the assembler's log)."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, case.signature, case.constants, case.attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    printed = io.StringIO()
    with triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = str(cache)
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(printed):
            artifact = triton.compile(source, target=gpu_target(capability), options=options)
    kept = cache / f"{artifact.hash}.log"
    if printed.getvalue():
        kept.write_text(printed.getvalue())
    return artifact, kept.read_text() if kept.exists() else ""


def _brief(message: str) -> str:
    """A compiler's error without the program that it quotes."""
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
        usage = printed_by(tools.cuobjdump.path, "-res-usage", str(path))
        found = _RESOURCES.search(usage)
        if found is None:
            raise RuntimeError(f"cuobjdump -res-usage printed no resources: {usage!r}")
        registers, stack, local = (int(number) for number in found.groups())
        if stack + local == 0:
            # Nothing to access. To disassemble a small kernel takes longer than to compile it.
            return registers, 0, 0
        code = printed_by(tools.nvdisasm.path, "-c", str(path))
    return registers, stack + local, len(_LOCAL_ACCESS.findall(code))


def _read_listing(code: str) -> tuple[int, int, int]:
    """The same of an AMD GPU's assembly: vector registers, scratch memory, registers spilled."""
    numbers = dict(_AMD_RESOURCES.findall(code))
    return (
        int(numbers["vgpr_count"]),
        int(numbers["private_segment_fixed_size"]),
        int(numbers["vgpr_spill_count"]),
    )


def printed_by(*command: str) -> str:
    """Standard output of a command that has to succeed."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _problems(case: CompileCase, found: Compiled, *, serialized: bool) -> Iterator[str]:
    architecture = ARCHITECTURES[found.capability]
    shared_limit, tensor_limit = architecture.shared_bytes, architecture.tensor_memory
    if case.main and found.local_accesses:
        bytes_used = f"{found.local_bytes} bytes of local memory a thread"
        yield f"{found.local_accesses} accesses to {bytes_used}"
    if found.shared_bytes > shared_limit:
        yield f"{found.shared_bytes} bytes of shared memory, over the limit of {shared_limit}"
    if found.tensor_memory > tensor_limit:
        yield f"{found.tensor_memory} columns of tensor memory, over {tensor_limit}"
    if case.expects_mma and found.capability == 90 and "wgmma" not in found.matrix:
        yield "no wgmma"
    elif case.expects_mma and not found.matrix:
        yield "no matrix instruction"
    if case.main and serialized:
        yield "the assembler serialises its wgmma instructions"
