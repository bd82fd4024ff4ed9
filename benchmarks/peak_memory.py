"""The memory that one forward and backward needs on top of its inputs, in a fresh process.

`python -m benchmarks.peak_memory LENGTH [--dtype bfloat16] ...` prints the bytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.call_memory import reset_peak, resident, unavailable_reason
from resformer_kernels import explain, value_residual_attention
from resformer_kernels.bench.timing import OURS
from resformer_kernels.testing.inputs import dtype_name

SDPA = "mix + SDPA"

_ROOT = Path(__file__).resolve().parent.parent


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
    command = [
        sys.executable,
        *("-m", __name__, str(length)),
        *("--heads", str(heads), "--head-dim", str(head_dim)),
        *("--dtype", dtype_name(dtype)),
        *("--threads", str(threads or torch.get_num_threads())),
        *("--contestant", contestant),
    ]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring peak memory failed: {done.stderr.strip()[-2000:]}")
    return int(done.stdout)


def _inputs(length: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shape = (1, length, heads, head_dim)
    values = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(4)]
    return [*values, *(torch.tensor(0.5, requires_grad=True) for _ in range(2))]


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, v_first: torch.Tensor, *lambdas: torch.Tensor
) -> torch.Tensor:
    mixed = lambdas[0] * v + lambdas[1] * v_first
    q, k, mixed = (x.transpose(1, 2) for x in (q, k, mixed))
    return F.scaled_dot_product_attention(q, k, mixed, is_causal=True).transpose(1, 2)


def _run(contestant: str, leaves: list[torch.Tensor], grad: torch.Tensor) -> None:
    ours = contestant == OURS
    out = value_residual_attention(*leaves, causal=True) if ours else _sdpa(*leaves)
    torch.autograd.grad(out, leaves, grad)


def _measure(contestant: str, length: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    leaves = _inputs(length, heads, head_dim, dtype)
    explained = explain(value_residual_attention, *leaves, causal=True)
    if contestant == OURS and explained.backend == "reference":
        raise RuntimeError(f"the reference holds every score in memory: {explained.reasons}")
    grad = torch.randn_like(leaves[0])
    small = _inputs(64, heads, head_dim, dtype)
    _run(contestant, small, torch.randn_like(small[0]))
    reset_peak()
    before = resident("VmRSS")
    _run(contestant, leaves, grad)
    return resident("VmHWM") - before


def main() -> None:
    """Measure in this process and print the bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("length", type=int)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--contestant", choices=(OURS, SDPA), default=OURS)
    args = parser.parse_args()
    reason = unavailable_reason()
    if reason is not None:
        raise SystemExit(reason)
    torch.set_num_threads(args.threads)
    extra = _measure(
        args.contestant, args.length, args.heads, args.head_dim, getattr(torch, args.dtype)
    )
    sys.stdout.write(f"{extra}\n")


if __name__ == "__main__":
    main()
