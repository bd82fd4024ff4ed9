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
WARP = 32
"""Threads of a warp."""


class Architecture(NamedTuple):
    """Compute capabilities that are served by the same configurations."""

    name: str
    """Name in tables of configurations."""
    shared_bytes: int
    """Limit of a block's shared memory, in bytes."""
    tensor_memory: int
    """Limit of a block's tensor memory, in columns; 0 where the architecture has none."""


ARCHITECTURES = {
    80: Architecture("sm80", 163 * 1024, 0),
    90: Architecture("sm90", 227 * 1024, 0),
    100: Architecture("sm100", 227 * 1024, 512),
}
"""Architectures that every kernel is compiled for, by compute capability: major * 10 + minor."""


def architecture(capability: tuple[int, int]) -> Architecture:
    """The architecture that serves a compute capability.

    Consumer Blackwell (12.x) has the shared memory and matrix instructions of sm_80's relatives.
    """
    major, _ = capability
    if major == 9:
        return ARCHITECTURES[90]
    return ARCHITECTURES[100 if major in (10, 11) else 80]


def has_tensor_descriptors(capability: tuple[int, int]) -> bool:
    """Whether tiles can be loaded and stored through tensor descriptors (TMA)."""
    return capability >= (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or those of the stand-in."""
    if device.type != "cuda":
        return STAND_IN_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
