"""The ops of a `*_cuda.cu` file for CPU tensors: nvcc's kernels run in the executor, behind the
op's own boundary.

The file is compiled as for the CUDA library, and linked with `cuda/runtime.cpp` in place of the
CUDA runtime. Its ops are registered for CPU tensors, in NAMESPACE.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import functools
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from build_support import cuda, native
from resformer_kernels._core.op import Op
from tests.gpu_on_cpu import build
from tests.gpu_on_cpu.executor import POLICIES, WHEN, Program, Region, Report, Schedule
from tests.gpu_on_cpu.limits import LIMITS, Limits

NAMESPACE = "resformer_cuda_on_cpu"
RUNTIME = Path(__file__).parent / "cuda" / "runtime.cpp"
ARCHITECTURES = {80: "8.0", 90: "9.0a"}
"""By compute capability, as `build_support.cuda` names them."""
_REGISTERED = "STABLE_TORCH_LIBRARY_IMPL(resformer, CUDA, m)"
_SUCCESS, _LAUNCH_FAILURE = 0, 719
_MULTIPROCESSORS, _COOPERATIVE, _SHARED_BLOCK = 16, 95, 97  # cudaDeviceAttr


@dataclasses.dataclass
class Gpu:
    """The GPU that the ops of a library find, and how it executes their kernels."""

    capability: int = 90
    limits: Limits | None = None
    """By default those of its capability."""
    told: Limits | None = None
    """What the runtime says that it has, where that is something else."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    reports: list[tuple[str, Report]] = dataclasses.field(default_factory=list)
    """Of the launches so far, with the kernels' names."""

    @property
    def has(self) -> Limits:
        """What it has."""
        return self.limits or LIMITS[self.capability]


GPUS = st.builds(
    Gpu,
    capability=st.sampled_from(sorted(ARCHITECTURES)),
    schedule=st.builds(
        Schedule, st.sampled_from(POLICIES), st.sampled_from(WHEN), st.integers(0, 2**20)
    ),
)
"""One of each architecture, under any schedule."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("regions", ctypes.POINTER(Region)),
        ("region_count", ctypes.c_uint64),
        *((name, 3 * ctypes.c_uint32) for name in ("grid", "threads")),
        *((name, ctypes.c_uint32) for name in ("dynamic_shared", "cooperative")),
    )


_TO_INT = ctypes.POINTER(ctypes.c_int)


class _Callbacks(ctypes.Structure):
    _fields_ = (
        ("launch", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))),
        (
            "blocks_resident",
            ctypes.CFUNCTYPE(
                *(ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint64, _TO_INT)
            ),
        ),
        ("attribute", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, _TO_INT)),
    )


class CudaOps:
    """The loaded library of a source, such as "mix/mix_cuda.cu".

    Its ops raise RuntimeError where a kernel is at fault, with the executor's words.
    """

    def __init__(self, source: str, ops: tuple[Op, ...]) -> None:
        if cuda.find_nvcc() is None:
            pytest.skip("nvcc is not here")
        self._folder = _built(source)
        self._defined = [op.define(NAMESPACE) for op in ops]
        self.gpu = Gpu()
        self.programs: dict[int, Program] = {}
        """By compute capability; a test may put another one there."""
        library = self._folder / "library.so"
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        kinds = dict(_Callbacks._fields_)
        functions = {name: getattr(self, f"_{name}") for name in kinds}
        self._callbacks = _Callbacks(**{name: kinds[name](functions[name]) for name in kinds})
        self._library.cuda_use(ctypes.byref(self._callbacks))

    def ptx(self, capability: int) -> str:
        """What nvcc made for a compute capability."""
        code = cuda.code(ARCHITECTURES[capability]).replace("sm", "compute")
        (found,) = self._folder.glob(f"*.{code}.ptx")
        return found.read_text()

    def _program(self) -> Program:
        capability = self.gpu.capability
        if capability not in self.programs:
            self.programs[capability] = Program(self.ptx(capability))
        return self.programs[capability]

    @functools.cached_property
    def _registers(self) -> dict[tuple[str, str], int]:
        """Of a thread, by kernel and architecture, as ptxas says."""
        found = re.findall(
            r"Compiling entry function '(\w+)' for '(\w+)'.+?Used (\d+) registers",
            (self._folder / "nvcc.log").read_text(),
            re.DOTALL,
        )
        return {(kernel, code): int(registers) for kernel, code, registers in found}

    def _registers_of(self, kernel: str) -> int:
        return self._registers[kernel, cuda.code(ARCHITECTURES[self.gpu.capability])]

    def _said(self, error: BaseException) -> int:
        self._library.cuda_say(str(error).encode())
        return _LAUNCH_FAILURE

    def _launch(self, given: Any) -> int:
        try:
            self._run(given.contents)
        except Exception as error:  # noqa: BLE001 - raised again by the op
            return self._said(error)
        return _SUCCESS

    def _run(self, given: Any) -> None:
        gpu, name, program = self.gpu, given.kernel.decode(), self._program()
        kernel = program.kernels[name]
        arguments = [
            ctypes.string_at(given.arguments[i], param.bytes)
            for i, param in enumerate(kernel.params)
        ]
        regions = given.regions[: given.region_count]
        report = program.run(
            *(name, tuple(given.grid), tuple(given.threads), arguments),
            memory={x.name.decode(): _bytes_at(x.data, x.bytes) for x in regions},
            written={x.data: _bytes_at(x.written, x.bytes) for x in regions},
            read_only={x.data for x in regions if not x.writable},
            dynamic_shared=given.dynamic_shared,
            registers=self._registers_of(name),
            cooperative=bool(given.cooperative),
            limits=gpu.has,
            schedule=gpu.schedule,
        )
        gpu.reports.append((name, report))

    def _blocks_resident(self, name: bytes, threads: int, dynamic_shared: int, found: Any) -> int:
        try:
            found[0] = self._program().resident(
                name.decode(),
                threads,
                dynamic_shared=dynamic_shared,
                registers=self._registers_of(name.decode()),
                limits=self.gpu.told or self.gpu.has,
            )
        except Exception as error:  # noqa: BLE001 - raised again by the op
            return self._said(error)
        return _SUCCESS

    def _attribute(self, which: int, found: Any) -> int:
        told = self.gpu.told or self.gpu.has
        known = {
            _MULTIPROCESSORS: told.multiprocessors,
            _COOPERATIVE: 1,
            _SHARED_BLOCK: told.shared_block,
        }
        if which not in known:
            return self._said(KeyError(f"attribute {which} of the device is not modelled"))
        found[0] = known[which]
        return _SUCCESS


def _bytes_at(address: int, size: int) -> Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


@functools.cache
def library(source: str, ops: tuple[Op, ...]) -> CudaOps:
    """The library of a source, built and loaded, and its ops defined, once for a process; skips
    where there is no nvcc."""
    return CudaOps(source, ops)


def _built(source: str) -> Path:
    """The folder with `library.so`, the PTX, and nvcc's words in `nvcc.log`."""
    given = native.ROOT / "csrc" / source
    folder = build.folder() / "cuda" / given.stem
    folder.mkdir(parents=True, exist_ok=True)
    text = given.read_text()
    assert _REGISTERED in text
    text = text.replace(_REGISTERED, f"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, CPU, m)")
    text = f'#line 1 "{given}"\n{text}'
    copy, rules = folder / given.name, folder / "build.ninja"
    tools = native.find_toolchain()
    ninja = [tools.ninja, "-C", str(native.ROOT), "-f", str(rules), "--quiet"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
        rules.write_text(_rules(copy, tools))
        done = subprocess.run(ninja, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source} does not build:\n{done.stdout}{done.stderr}")
    return folder


def _rules(source: Path, tools: native.Toolchain) -> str:
    folder = source.parent
    nvcc = shlex.quote(str(tools.nvcc))
    flags = shlex.join(
        cuda.compile_flags(tuple(ARCHITECTURES.values()), tools.cxx, tools.torch)
    ).replace("$", "$$")
    torch_library = tools.torch / "lib"
    return "\n".join(
        [
            f"builddir = {folder}",
            f"flags = {flags}",
            "rule compile",
            f"  command = {nvcc} $flags $more -MD -MF $out.d -c $in -o $out > $log 2>&1"
            " || (cat $log; exit 1)",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {tools.cxx} -shared -o $out $in -Wl,-Bsymbolic -Wl,-z,defs"
            f" -L{torch_library} -Wl,-rpath-link,{torch_library} -ltorch_cpu -lc10",
            f"build {folder}/kernels.o: compile {source}",
            f"  more = -lineinfo -Xptxas=-v --keep --keep-dir {folder}",
            f"  log = {folder}/nvcc.log",
            f"build {folder}/runtime.o: compile {RUNTIME}",
            "  more = -x c++",
            f"  log = {folder}/runtime.log",
            f"build {folder}/library.so: link {folder}/kernels.o {folder}/runtime.o",
            "",
        ]
    )
