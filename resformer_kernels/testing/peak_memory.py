"""The memory that one forward and backward needs on top of its inputs, in a fresh process.

`python -m resformer_kernels.testing.peak_memory LENGTH [--dtype bfloat16] ...` prints the bytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from resformer_kernels import explain, value_residual_attention

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_extra_bytes(
    length: int, *, heads: int, head_dim: int, dtype: torch.dtype, threads: int | None = None
) -> int:
    """Peak memory of a causal forward and backward with learnable λ, less what its inputs hold.

    The result includes the output, the gradients and what is saved for backward. Runs in a child
    process. RuntimeError where the system does not say (it needs Linux's /proc) or the child
    fails.
    """
    command = [
        sys.executable,
        *("-m", __name__, str(length)),
        *("--heads", str(heads), "--head-dim", str(head_dim)),
        *("--dtype", str(dtype).removeprefix("torch.")),
        *("--threads", str(threads or torch.get_num_threads())),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring peak memory failed: {done.stderr.strip()[-2000:]}")
    return int(done.stdout)


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


def _inputs(length: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shape = (1, length, heads, head_dim)
    values = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(4)]
    return [*values, *(torch.tensor(0.5, requires_grad=True) for _ in range(2))]


def _run(leaves: list[torch.Tensor], grad: torch.Tensor) -> None:
    out = value_residual_attention(*leaves, causal=True)
    torch.autograd.grad(out, leaves, grad)


def _measure(length: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    leaves = _inputs(length, heads, head_dim, dtype)
    explained = explain(value_residual_attention, *leaves, causal=True)
    if explained.backend == "reference":
        raise RuntimeError(f"the reference holds every score in memory: {explained.reasons}")
    grad = torch.randn_like(leaves[0])
    small = _inputs(64, heads, head_dim, dtype)
    _run(small, torch.randn_like(small[0]))
    _CLEAR.write_text(_RESET_PEAK)
    before = _status("VmRSS")
    _run(leaves, grad)
    return _status("VmHWM") - before


def main() -> None:
    """Measure in this process and print the bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("length", type=int)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    if not _CLEAR.exists():
        raise SystemExit(f"{_CLEAR} does not exist: peak memory is read from Linux's /proc")
    torch.set_num_threads(args.threads)
    extra = _measure(args.length, args.heads, args.head_dim, getattr(torch, args.dtype))
    sys.stdout.write(f"{extra}\n")


if __name__ == "__main__":
    main()
