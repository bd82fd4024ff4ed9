"""What a backend asks about the machine. `MACHINE` answers for this one; the support matrix passes
another object, and so asks about a machine that need not be there."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from resformer_kernels._core import extension, processor
from resformer_kernels._triton import arch, available

F = TypeVar("F", bound=Callable[..., Any])

_AMX = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
"""The flag of AMX tiles that multiply a dtype."""


def _constant(method: F) -> F:
    """Mark a method whose answer torch.compile takes as a constant: it cannot trace an import. The
    public decorator that sets this mark imports all of torch._dynamo, which no import may cost."""
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


class Hardware:
    """The libraries, packages and GPUs of this machine. Reasons are None where nothing is missing,
    and read after "cannot serve this call:"."""

    def __init__(self) -> None:
        self.packages: dict[str, Any] = {}
        """What `package` has loaded."""
        self.cpu_flags: frozenset[str] | None = None
        """Instruction sets of the CPU, once they were asked for."""

    @_constant
    def cpu_library_reason(self) -> str | None:
        """Why the native CPU library cannot be used."""
        return extension.unavailable_reason()

    @_constant
    def torch_multiplies_on_amx(self, dtype: torch.dtype) -> bool:
        """Whether torch, by oneDNN, multiplies matrices of `dtype` on this CPU's AMX tiles: float16
        from Granite Rapids on, whose tiles take it; before, it is widened to float32."""
        wanted = _AMX.get(dtype)
        if wanted is None or not torch.backends.mkldnn.is_available():
            return False
        if self.cpu_flags is None:
            self.cpu_flags = processor.flags()
        return {"amx_tile", wanted} <= self.cpu_flags

    @_constant
    def native_path_asked(self) -> bool:
        """Whether RESFORMER_CPU asks for a path of the native kernels."""
        return bool(os.environ.get("RESFORMER_CPU"))

    @_constant
    def cuda_library_reason(self, device: torch.device) -> str | None:
        """Why the native CUDA library cannot serve `device`."""
        return extension.cuda_unavailable_reason(device)

    @_constant
    def cuda_memory(self, device: torch.device) -> tuple[int, int]:
        """(multiprocessors, bytes of shared memory a block may have) of a CUDA device."""
        return extension.cuda_memory(device)

    @_constant
    def capability(self, device: torch.device) -> tuple[int, int]:
        """Compute capability of a CUDA device."""
        return arch.capability_of(device)

    @_constant
    def triton_reason(self, device: torch.device) -> str | None:
        """Why Triton kernels cannot run on tensors of `device`."""
        return available.unavailable_reason(device)

    @_constant
    def triton_reason_against_auto(self, device: torch.device) -> str | None:
        """Why `auto` leaves Triton kernels out that can run on tensors of `device`."""
        return available.reason_against_auto(device)

    def triton_notes(self, device: torch.device) -> list[str]:
        """What `explain` says where Triton kernels serve tensors of `device`."""
        return available.notes(self.capability(device)) if device.type == "cuda" else []

    @_constant
    def package(self, name: str, load: Callable[[str], Any]) -> str | tuple[str, ...]:
        """Why an optional package cannot be used, or what its build `lacks`.

        `load(name)` is called once: it gives the reason, or what a backend uses of the package,
        which is then in `packages`: torch.compile takes no function from a constant.
        """
        if name not in self.packages:
            self.packages[name] = load(name)
        found = self.packages[name]
        return found if isinstance(found, str) else tuple(found.lacks)


MACHINE = Hardware()
