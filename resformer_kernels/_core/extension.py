"""The compiled libraries, of the CPU and of CUDA: loaded at first use, never at import."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "libresformer_cpu.so"
CUDA_LIBRARY = Path(__file__).parents[1] / "libresformer_cuda.so"
CPU_PATHS = ("portable", "avx2", "avx512", "avx512_bf16", "avx512_amx")

_lib = torch.library.Library("resformer", "FRAGMENT")
_lib.define("cpu_isa() -> int")
_lib.define("cpu_isa_best() -> int")
_lib.define("cuda_architectures() -> str")
_lib.define("cuda_runtime_version() -> int")
_lib.define("cuda_driver_version() -> int")

_NOT_TRIED = "not tried"
_reason: str | None = _NOT_TRIED


def foreign_device(device: torch.device, *, cuda: bool) -> str | None:
    """Why native kernels cannot run on tensors of `device`, whatever is installed; None when they
    can. `cuda`: whether the op has a CUDA kernel."""
    kind = device.type
    if kind == "cpu" or (kind == "cuda" and torch.version.hip is None and cuda):
        return None
    runs_on = "it runs on CPU and CUDA tensors" if cuda else "it runs on CPU tensors"
    if kind == "cuda" and torch.version.hip is not None:
        return f"{runs_on}, these are on ROCm, for which it has no kernels"
    if kind == "mps":
        return f"{runs_on}, these are on Apple's MPS, for which it has no kernels"
    return f"{runs_on}, these are on {device}"


def unavailable_reason() -> str | None:
    """Load the CPU library if that was not tried yet; None when it is usable, else why not."""
    global _reason
    if _reason is _NOT_TRIED:
        _reason = _load(LIBRARY, "the native library", "where a C++ compiler is")
    return _reason


def cuda_unavailable_reason(device: torch.device) -> str | None:
    """Load the CUDA library if that was not tried yet; None when it can serve `device`, else why
    it cannot."""
    return cuda_library_reason() or _cuda_device_reason(device)


def cuda_memory(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a CUDA device, and bytes of shared memory that a block may have."""
    about = torch.cuda.get_device_properties(device)
    block_bytes: int = about.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return about.multi_processor_count, block_bytes


# torch.compile must see the answers as constants: it cannot trace the loading of a library. The
# public decorator that sets this mark imports all of torch._dynamo, which no import may cost.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
cuda_unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
cuda_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load(library: Path, name: str, where: str) -> str | None:
    if not library.exists():
        return f"{name} is not built ({library} does not exist): install the package again {where}"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"{name} does not load: {error}"
    return None


@functools.cache
def cuda_library_reason() -> str | None:
    """Load the CUDA library if that was not tried yet; None when it is there, else why not."""
    return _load(CUDA_LIBRARY, "the CUDA library", "where nvcc is (RESFORMER_CUDA=1 insists)")


@functools.cache
def _cuda_device_reason(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device, or is built without CUDA"
    return _driver_reason() or _architecture_reason(torch.cuda.get_device_capability(device))


def _driver_reason() -> str | None:
    # A driver runs what was built for its own major version of CUDA and for those before.
    runtime = torch.ops.resformer.cuda_runtime_version()
    driver = torch.ops.resformer.cuda_driver_version()
    if driver // 1000 >= runtime // 1000:
        return None
    return (
        f"the CUDA library is built with CUDA {_version(runtime)}, and the driver runs up to "
        f"CUDA {_version(driver)}: update it, or build with an older CUDA toolkit"
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _architecture_reason(capability: tuple[int, int]) -> str | None:
    built: list[str] = torch.ops.resformer.cuda_architectures().split()
    if any(runs_on(name, capability) for name in built):
        return None
    wanted = ".".join(str(part) for part in capability)
    return (
        f"the CUDA library holds code for compute capability {', '.join(built)}, this device has "
        f"{wanted}: build with RESFORMER_CUDA_ARCHS={wanted}"
    )


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what a library holds for an architecture, such as "9.0a" or "10.0+PTX"."""
    # Machine code runs on later minor versions too, that of a variant such as 9.0a does not; PTX is
    # compiled by the driver, for every later version.
    name, ptx, _ = architecture.partition("+PTX")
    major, minor = (int(part) for part in name.rstrip("af").split("."))
    if ptx:
        return capability >= (major, minor)
    later = not architecture.endswith("a") and minor < capability[1]
    return major == capability[0] and (minor == capability[1] or later)


def _require() -> None:
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"resformer_kernels: {reason}")


def cpu_path() -> str:
    """The CPU path that native kernels take now: one of `CPU_PATHS`.

    The environment variable RESFORMER_CPU forces one. Raises RuntimeError where the library is
    not available, or where RESFORMER_CPU names a path that this machine or build lacks.
    """
    _require()
    return CPU_PATHS[torch.ops.resformer.cpu_isa()]


def available_cpu_paths() -> tuple[str, ...]:
    """Every CPU path that both this machine and this build have, slowest first.

    Raises RuntimeError where the library is not available.
    """
    _require()
    best: int = torch.ops.resformer.cpu_isa_best()
    return CPU_PATHS[: best + 1]
