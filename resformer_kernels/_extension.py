"""The compiled CPU library: found and loaded at its first use, never at import."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libresformer_cpu.so")
CPU_PATHS = ("portable", "avx2", "avx512", "avx512_bf16")

_lib = torch.library.Library("resformer", "FRAGMENT")
_lib.define("cpu_isa() -> int")
_lib.define("cpu_isa_best() -> int")

_NOT_TRIED = "not tried"
_reason: str | None = _NOT_TRIED


def unavailable_reason() -> str | None:
    """Load the library if that was not tried yet; None when it is usable, else why it is not."""
    global _reason
    if _reason is _NOT_TRIED:
        _reason = _load()
    return _reason


# torch.compile must see the answer as a constant: it cannot trace the loading of a library. The
# public decorator that sets this mark imports all of torch._dynamo, which no import may cost.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load() -> str | None:
    if not LIBRARY.exists():
        return (
            f"the native library is not built ({LIBRARY} does not exist): "
            "install the package again where a C++ compiler is"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the native library does not load: {error}"
    return None


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
