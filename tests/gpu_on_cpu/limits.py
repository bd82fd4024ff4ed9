"""What GPUs have that are not there."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """What a GPU has, in the order of `gpu_launch`."""

    multiprocessors: int
    registers: int
    """Of a multiprocessor."""
    shared: int
    """Bytes of shared memory of a multiprocessor."""
    shared_block: int
    """The most bytes that a block may ask for."""
    shared_reserved: int
    """Bytes that each block takes besides."""
    warps: int
    """Resident on a multiprocessor."""
    blocks: int
    """Resident on a multiprocessor."""
    threads_block: int


LIMITS = {
    80: Limits(108, 65536, 164 << 10, 163 << 10, 1024, 64, 32, 1024),
    90: Limits(132, 65536, 228 << 10, 227 << 10, 1024, 64, 32, 1024),
}
"""Of an A100 and an H100, by compute capability, as the CUDA programming guide has them."""
