"""Limits of GPU architectures, and a stand-in for the GPU where there is none to ask.

The limits are those of the CUDA programming guide's table of compute capabilities.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

OLDEST = (8, 0)
"""The oldest compute capability that the Triton kernels are written for."""
STAND_IN = (9, 0)
"""Compute capability to choose for without a GPU: that of an H100."""
STAND_IN_MULTIPROCESSORS = 132
"""Multiprocessors to plan for without a GPU: those of an H100."""


class Architecture(NamedTuple):
    """Compute capabilities that are served by the same configurations."""

    name: str
    """Name in tables of configurations."""
    shared_bytes: int
    """Limit of a block's shared memory, in bytes."""
    tensor_memory: int = 0
    """Limit of a block's tensor memory, in columns; 0 where the architecture has none."""
    warp: int = 32
    """Threads of a warp."""


ARCHITECTURES = {
    80: Architecture("sm80", 163 * 1024),
    86: Architecture("sm86", 99 * 1024),
    89: Architecture("sm86", 99 * 1024),
    90: Architecture("sm90", 227 * 1024),
    100: Architecture("sm100", 227 * 1024, 512),
    120: Architecture("sm120", 99 * 1024),
    942: Architecture("gfx9", 64 * 1024, warp=64),
    950: Architecture("gfx9", 160 * 1024, warp=64),
}
"""Architectures that every kernel is compiled for, by compute capability: major * 10 + minor. Those
of AMD are numbered as they name them: gfx942 is (94, 2)."""
_FIRST_OF_AMD = (90, 0)
RAN: frozenset[str] = frozenset()
"""Names of the architectures on which a stored run in benchmarks/results/ shows the kernels."""


def architecture(capability: tuple[int, int]) -> Architecture:
    """The architecture that serves a compute capability: a GeForce's if it is later than these."""
    major, minor = capability
    if is_amd(capability):
        return ARCHITECTURES[10 * major + minor]
    if major == 8:
        # 8.7, of a Jetson, has the shared memory of 8.0.
        return ARCHITECTURES[80 if minor in (0, 7) else 86]
    if major == 9:
        return ARCHITECTURES[90]
    return ARCHITECTURES[100 if major in (10, 11) else 120]


def is_amd(capability: tuple[int, int]) -> bool:
    """Whether a compute capability is that of an AMD GPU."""
    return capability >= _FIRST_OF_AMD


def label(capability: int) -> str:
    """The name that compilers have for an architecture of `ARCHITECTURES`."""
    return f"{'gfx' if is_amd(divmod(capability, 10)) else 'sm_'}{capability}"


def has_tensor_descriptors(capability: tuple[int, int]) -> bool:
    """Whether tiles are loaded and stored through tensor descriptors (TMA).

    GeForces of 12.x have them too, but Triton 3.6 gives their kernels local memory there.
    """
    return (9, 0) <= capability < (12, 0)


def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; (90, 0) for one of AMD whose name has letters."""
    if torch.version.hip is None:
        return torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    number = name.removeprefix("gfx")
    return divmod(int(number), 10) if number.isdecimal() else _FIRST_OF_AMD


def has_dependent_launches(capability: tuple[int, int]) -> bool:
    """Whether a kernel may be launched before those that it waits for have ended."""
    return capability >= (9, 0) and not is_amd(capability)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or those of the stand-in."""
    if device.type != "cuda":
        return STAND_IN_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
