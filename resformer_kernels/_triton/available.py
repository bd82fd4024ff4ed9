"""Whether Triton can serve a device. Imports torch alone: Triton is loaded when a kernel is."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.torch_version import TorchVersion

from resformer_kernels._triton import arch, faults

OLDEST = "3.6"
_served = False


@contextmanager
def served_on_cpu() -> Iterator[None]:
    """Within it kernels serve CPU tensors: something runs their launches in a GPU's place."""
    global _served
    before, _served = _served, True
    try:
        yield
    finally:
        _served = before


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable_reason(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`; None when they can."""
    kind = device.type
    if kind == "cpu":
        if not interpreted() and not _served:
            return "it runs on CUDA tensors, these are on the CPU (TRITON_INTERPRET=1 emulates)"
        return version_reason()
    if kind == "mps":
        return "it runs on CUDA tensors, these are on Apple's MPS, which Triton does not support"
    if kind != "cuda":
        return f"it runs on CUDA tensors, these are on {device}"
    capability = arch.capability_of(device)
    if arch.is_amd(capability):
        compiled = [number for number in arch.ARCHITECTURES if arch.is_amd(divmod(number, 10))]
        if 10 * capability[0] + capability[1] in compiled:
            return version_reason()
        names = " and ".join(map(arch.label, compiled))
        return f"of AMD's GPUs it is compiled for {names} alone, {device} is another"
    if capability < arch.OLDEST:
        found = ".".join(str(part) for part in capability)
        return f"it needs compute capability 8.0 or newer, {device} has {found}"
    return version_reason(capability)


def reason_against_auto(device: torch.device) -> str | None:
    """Why `auto` does not take kernels that can run on tensors of `device`; None where it does."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "no AMD GPU has run its kernels yet: backend='triton' takes them"
    return None


def notes(capability: tuple[int, int]) -> list[str]:
    """What `explain` says of a GPU that no stored run shows, and of the installed Triton."""
    name = arch.architecture(capability).name
    found = [] if name in arch.RAN else [f"compiled for {name}, and not yet run on such a GPU"]
    version = str(importlib.import_module("triton").__version__)
    return [*found, *faults.notes(version, capability)]


# torch.compile must see the answers as constants: it cannot trace an import.
reason_against_auto._dynamo_marked_constant = True  # type: ignore[attr-defined]
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def version_reason(capability: tuple[int, int] | None = None) -> str | None:
    """Why the Triton that is installed will not do, on GPUs of a compute capability or in the
    interpreter; None where it will."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}): pip install 'resformer-kernels[triton]'"
    return refusal(str(triton.__version__), capability)


def refusal(version: str, capability: tuple[int, int] | None) -> str | None:
    """Why a version of Triton will not do; None where it will."""
    if TorchVersion(version) < OLDEST:
        return f"it needs Triton {OLDEST} or newer, {version} is installed"
    return None if capability is None else faults.refusal(version, capability)
