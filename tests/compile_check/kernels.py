"""Kernels with one thing wrong each, one that is right, and how their launchers start them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resformer_kernels._triton.launch import launch

META = torch.device("meta")


@triton.jit
def matmul(
    a, b, out, n: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    IEEE: tl.constexpr,
):  # fmt: skip
    """out (M, N) = a (M, n) b (n, N), all contiguous."""
    i = tl.arange(0, M)
    j = tl.arange(0, N)
    step = tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, n, K):
        left = tl.load(a + i[:, None] * n + (k + step)[None, :])
        right = tl.load(b + (k + step)[:, None] * N + j[None, :])
        total = tl.dot(left, right, total, input_precision="ieee" if IEEE else None)
    tl.store(out + i[:, None] * N + j[None, :], total)


@triton.jit
def multiply_transposed(a, b, out, N: tl.constexpr):
    """out (N, N) = (a b)' b."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    right = tl.load(b + at)
    product = tl.dot(tl.load(a + at), right).to(right.dtype)
    tl.store(out + at, tl.dot(tl.trans(product), right))


@triton.jit
def matmul_by_descriptor(a, b, out, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """out (M, N) = a (M, n) b (n, N) with tiles of `a` and `b` loaded by tensor descriptor."""
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, n, K):
        total = tl.dot(a.load([0, k]), b.load([k, 0]), total)
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], total)


@triton.jit
def copy(source, target, n, BLOCK: tl.constexpr):
    """target = source, n elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)


@triton.jit
def hoard(source, target, BLOCK: tl.constexpr):
    """A sum that every element waits for."""
    at = tl.arange(0, BLOCK)
    x = tl.load(source + at)
    tl.store(target + at, x - tl.sum(x, 0))


@triton.jit
def wrong(source, BLOCK: tl.constexpr):
    """Adds vectors of two lengths."""
    tl.store(source, tl.sum(tl.arange(0, BLOCK) + tl.arange(0, 2 * BLOCK), 0))


@triton.jit
def overwrite(
    best, other, x, out, BLOCK: tl.constexpr, SAME: tl.constexpr, BARRIER: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Zeroes best or other, before or after best is loaded, and sums x if best was above 1."""
    value = tl.load(x + tl.arange(0, BLOCK))
    if SAME:
        zeroed = best
    else:
        zeroed = other
    if EARLY:
        tl.store(zeroed, 0.0)
    else:
        before = tl.load(best)
    if BARRIER:
        tl.debug_barrier()
    if EARLY:
        before = tl.load(best)
    else:
        tl.store(zeroed, 0.0)
    # Threads meet for the sum.
    if before > 1.0:
        tl.store(out, tl.sum(value, 0))


def launch_matmul(
    m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, **options: int
) -> None:
    """One block of a product, on meta tensors."""
    a, b = (torch.empty(shape, device="meta", dtype=dtype) for shape in ((m, 4096), (4096, n)))
    out = torch.empty((m, n), device="meta")
    ieee = dtype is torch.float32
    launch(matmul, (1,), META, a=a, b=b, out=out, n=4096, M=m, N=n, K=k, IEEE=ieee, **options)


def launch_matmul_by_descriptor(num_stages: int) -> None:
    """One block of 64 rows and columns, on meta tensors."""
    a, b = (torch.empty(x, device="meta", dtype=torch.bfloat16) for x in ((64, 4096), (4096, 64)))
    arguments = {
        "a": TensorDescriptor.from_tensor(a, [64, 64]),
        "b": TensorDescriptor.from_tensor(b, [64, 64]),
        "out": torch.empty((64, 64), device="meta"),
    }
    sizes = {"n": 4096, "M": 64, "N": 64, "K": 64}
    launch(matmul_by_descriptor, (1,), META, **arguments, **sizes, num_stages=num_stages)


def launch_multiply_transposed() -> None:
    """One block of 64 rows and columns."""
    a, b = (torch.empty((64, 64), device="meta", dtype=torch.bfloat16) for _ in range(2))
    launch(multiply_transposed, (1,), META, a=a, b=b, out=torch.empty(64, 64, device=META), N=64)


def launch_copy(source: Tensor) -> None:
    """A copy of a flat tensor."""
    n = source.numel()
    target = torch.empty_like(source)
    launch(copy, (triton.cdiv(n, 1024),), META, source=source, target=target, n=n, BLOCK=1024)


def launch_hoard(maxnreg: int) -> None:
    """128 elements a thread, in `maxnreg` registers."""
    x = torch.empty(128 * 128, device="meta")
    launch(hoard, (1,), META, source=x, target=x, BLOCK=x.numel(), maxnreg=maxnreg)


def launch_overwrite(*, same: bool, barrier: bool, early: bool) -> None:
    """One program that loads a number and zeroes it, or another one."""
    best, other, out = (torch.empty(1, device=META) for _ in range(3))
    x = torch.empty(1024, device=META)
    options = {"SAME": same, "BARRIER": barrier, "EARLY": early}
    launch(overwrite, (1,), META, best=best, other=other, x=x, out=out, BLOCK=1024, **options)


def launch_wrong() -> None:
    """A kernel that Triton refuses."""
    launch(wrong, (1,), META, source=torch.empty(1, device=META), BLOCK=16)
