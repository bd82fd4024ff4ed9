"""The machine that a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

import resformer_kernels
from resformer_kernels._core import extension
from resformer_kernels._core import processor as cpu

_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
    *("avx512_fp16", "amx_bf16", "asimd", "sve", "bf16"),
)
"""Flags of a processor that decide the CPU path, or that readers of a benchmark want to know."""


def processor() -> str:
    """The processor's name, as the system gives it."""
    return cpu.entry("model name") or platform.processor() or platform.machine()


def features() -> str:
    """Those of `_FEATURES` that the processor has."""
    found = cpu.flags()
    return " ".join(name for name in _FEATURES if name in found) or "none known"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def native_path() -> str:
    """The CPU path of the native kernels, or why they have none."""
    reason = extension.unavailable_reason()
    return extension.cpu_path() if reason is None else f"none: {reason}"


def describe() -> dict[str, str | int]:
    """Machine, threads, versions and commit, for a record of results."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "native path": native_path(),
        "features": features(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "resformer-kernels": resformer_kernels.__version__,
        "commit": commit(),
    }


def slug() -> str:
    """A file name's stem for this machine: its processor, threads, CPU path, and AMX, which
    multiplies torch's rate in bfloat16."""
    text = f"{processor()} {torch.get_num_threads()} threads {native_path().split(':')[0]}"
    amx = " amx" if "amx_bf16" in features() else ""
    return _hyphenated(text.replace("_", "") + amx)


def _hyphenated(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe_device(device: torch.device | str) -> dict[str, str | int]:
    """A device, its versions and the commit, for a record of results."""
    device = torch.device(device)
    found: dict[str, str | int] = {"device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "L2 bytes": properties.L2_cache_size,
            "memory bytes": properties.total_memory,
            "cuda": str(torch.version.cuda),
        }
    return {**found, **versions(_DEVICE_PACKAGES), **describe()}


_DEVICE_PACKAGES = ("triton", "flash-attn", "flash-attn-3", "fa3-fwd", "flash-attn-4")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device_slug(device: torch.device | str) -> str:
    """A file name's stem for a GPU: its name."""
    device = torch.device(device)
    return _hyphenated(torch.cuda.get_device_name(device) if device.type == "cuda" else str(device))


def commit() -> str:
    """The commit of the checkout that the package runs from, "+" if changed; else "unknown"."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        name = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+" if changed else name
