"""The most that this machine can do: ceilings printed beside every timing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from resformer_kernels.bench.timing import MIN_SAMPLES, Timer, alternate
from resformer_kernels.testing.inputs import dtype_name

_GEMM_SIZE = 2048
_ARRAY_BYTES = 256 * 2**20


def gemm_rates(
    dtypes: tuple[torch.dtype, ...],
    *,
    samples: int = MIN_SAMPLES,
    size: int | None = None,
    device: torch.device | str = "cpu",
    timer: Timer | None = None,
) -> dict[str, float]:
    """FLOP/s of torch's square matrix product, by dtype name, at the current threads.

    Args:
        dtypes: of the operands, which are random: zeros run faster on some GPUs.
        samples: samples of each.
        size: rows and columns (default: 2048).
        device: where it runs.
        timer: how a call is timed (default: by the clock of the host).
    """
    size = size or _GEMM_SIZE
    contestants = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        contestants[dtype_name(dtype)] = lambda a=a, b=b: torch.mm(a, b)
    timings = alternate(contestants, samples=samples, timer=timer)
    return {name: 2 * size**3 / timing.median for name, timing in timings.items()}


def bandwidths(
    *,
    samples: int = MIN_SAMPLES,
    array_bytes: int | None = None,
    device: torch.device | str = "cpu",
    timer: Timer | None = None,
) -> dict[str, float]:
    """Bytes a second through memory: "read" (a sum) and "copy" (read and written, both counted)."""
    array_bytes = array_bytes or _ARRAY_BYTES
    source = torch.ones(array_bytes // 4, device=device)
    target = torch.empty_like(source)
    contestants: dict[str, Callable[[], object]] = {
        "read": source.sum,
        "copy": lambda: target.copy_(source),
    }
    timings = alternate(contestants, samples=samples, timer=timer)
    return {
        "read": array_bytes / timings["read"].median,
        "copy": 2 * array_bytes / timings["copy"].median,
    }
