"""The memory that one forward and backward needs on top of its inputs, in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.call_memory import reset_peak, resident, unavailable_reason
from resformer_kernels import explain, value_residual_attention
from resformer_kernels.bench.attention import AttentionBenchmark, mix_and_sdpa
from resformer_kernels.bench.timing import OURS

SDPA = "mix + SDPA"


def peak_extra_bytes(
    length: int,
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    threads: int | None = None,
    contestant: str = OURS,
) -> int:
    """Peak memory of a causal forward and backward with learnable λ, less what its inputs hold.

    The result includes the output, the gradients and what is saved for backward. `contestant` is
    `OURS` or `SDPA`, which mixes first. Runs in a child process. RuntimeError where the system
    does not say (it needs Linux's /proc) or the child fails.
    """
    threads = threads or torch.get_num_threads()
    shape = (1, heads, heads, length, head_dim)
    case = AttentionBenchmark(*shape, dtype, "backward")
    with ProcessPoolExecutor(1, get_context("spawn")) as child:
        try:
            return child.submit(_measure, contestant, case, threads).result()
        except Exception as error:
            raise RuntimeError(f"measuring peak memory failed: {error}") from error


def _sdpa(*leaves: Tensor) -> Tensor:
    return mix_and_sdpa(*leaves).transpose(1, 2)


def _step(attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(attend(*leaves), leaves, grad)


def _measure(contestant: str, case: AttentionBenchmark, threads: int) -> int:
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(reason)
    torch.set_num_threads(threads)
    leaves, grad = [x.requires_grad_() for x in case.leaves()], case.grad()
    explained = explain(value_residual_attention, *leaves, causal=True)
    if contestant == OURS and explained.backend == "reference":
        raise RuntimeError(f"the reference holds every score in memory: {explained.reasons}")
    attend = partial(value_residual_attention, causal=True) if contestant == OURS else _sdpa
    # What a first call loads is not counted.
    _step(attend, [x[:, :64] if x.dim() else x for x in leaves], grad[:, :64])
    reset_peak()
    before = resident("VmRSS")
    _step(attend, leaves, grad)
    return resident("VmHWM") - before
