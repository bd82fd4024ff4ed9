"""What this machine can do at best: the yardsticks that stand beside every timing."""

from __future__ import annotations

import torch

from resformer_kernels.testing.timing import MIN_SAMPLES, alternate

_GEMM_SIZE = 2048
_ARRAY_BYTES = 256 * 2**20


def gemm_rates(dtypes: tuple[torch.dtype, ...], *, samples: int = MIN_SAMPLES) -> dict[str, float]:
    """FLOP/s of torch's square 2048 matrix product, by dtype name, at the current threads."""
    contestants = {}
    for dtype in dtypes:
        a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        contestants[name] = lambda a=a, b=b: torch.mm(a, b)
    timings = alternate(contestants, samples=samples)
    return {name: 2 * _GEMM_SIZE**3 / timing.median for name, timing in timings.items()}


def bandwidths(*, samples: int = MIN_SAMPLES) -> dict[str, float]:
    """Bytes a second through memory: "read" (a sum) and "copy" (read and written, both counted)."""
    source = torch.ones(_ARRAY_BYTES // 4)
    target = torch.empty_like(source)
    timings = alternate({"read": source.sum, "copy": lambda: target.copy_(source)}, samples=samples)
    return {
        "read": _ARRAY_BYTES / timings["read"].median,
        "copy": 2 * _ARRAY_BYTES / timings["copy"].median,
    }
