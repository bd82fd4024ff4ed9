"""A kernel for which Triton 3.6 leaves a barrier out."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def multiply_twice(out, EARLY: gl.constexpr, LATE: gl.constexpr):
    """Two products with one tile in shared memory; barriers before and after the first's wait."""
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16])
    left = gl.allocate_shared_memory(
        gl.bfloat16, [128, 64], gl.NVMMASharedLayout.get_default_for([128, 64], gl.bfloat16)
    )
    right = gl.allocate_shared_memory(
        gl.bfloat16, [64, 64], gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    )
    ones = gl.full([64, 64], 1.0, gl.bfloat16, blocked)
    left.store(gl.full([128, 64], 2.0, gl.bfloat16, blocked))
    right.store(ones)
    fence_async_shared()
    total = gl.zeros([128, 64], gl.float32, product)
    total = warpgroup_mma(left, right, total, is_async=True)
    if EARLY:
        gl.thread_barrier()
    total = warpgroup_mma_wait(0, [total])
    if LATE:
        gl.thread_barrier()
    right.store(ones + ones)
    fence_async_shared()
    total = warpgroup_mma(left, right, total, is_async=True)
    total = warpgroup_mma_wait(0, [total])
    rows = gl.arange(0, 128, gl.SliceLayout(1, product))
    columns = gl.arange(0, 64, gl.SliceLayout(0, product))
    gl.store(out + rows[:, None] * 64 + columns[None, :], total)
