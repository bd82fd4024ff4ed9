"""Whether Triton can serve a device. Imports torch alone: Triton is loaded when a kernel is."""

from __future__ import annotations

import importlib
import os

import torch
from torch.torch_version import TorchVersion

from resformer_kernels._triton import arch, faults

OLDEST = "3.6"


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable_reason(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`; None when they can."""
    kind = device.type
    if kind == "cpu":
        if not interpreted():
            return "it runs on CUDA tensors, these are on the CPU (TRITON_INTERPRET=1 emulates)"
        return version_reason()
    if kind == "mps":
        return "it runs on CUDA tensors, these are on Apple's MPS, which Triton does not support"
    if kind != "cuda":
        return f"it runs on CUDA tensors, these are on {device}"
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs and was never run on ROCm, which these tensors are on"
    capability = torch.cuda.get_device_capability(device)
    if capability < arch.OLDEST:
        found = ".".join(str(part) for part in capability)
        return f"it needs compute capability 8.0 or newer, {device} has {found}"
    return version_reason(capability)


# torch.compile must see the answer as a constant: it cannot trace an import.
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
