"""Run the registry: ours and every peer alternate in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch

from resformer_kernels.testing import machine
from resformer_kernels.testing.ceilings import bandwidths, gemm_rates
from resformer_kernels.testing.fresh_pages import freed_memory_kept
from resformer_kernels.testing.peak_memory import peak_extra_bytes
from resformer_kernels.testing.timing import Benchmark, Result, measure
from resformer_kernels.testing.workloads import AttentionBenchmark

FORMAT = 1
"""Of the stored JSON."""
SETTLE_ROUNDS = 10
"""Four or five are enough as a rule."""


@dataclass(frozen=True)
class MemoryPoint:
    """Peak memory of a forward and backward at one length, less what the inputs hold."""

    length: int
    dtype: str
    heads: int
    head_dim: int
    bytes: int


@dataclass
class Run:
    """What one run of the suite found."""

    machine: dict[str, str | int]
    started: str
    gemm: dict[str, float] = field(default_factory=dict)
    """FLOP/s by dtype."""
    bandwidth: dict[str, float] = field(default_factory=dict)
    """Bytes a second: "read", "copy"."""
    freed_memory_kept: bool = False
    """Whether outputs reuse pages, ours and the peers' alike."""
    results: list[Result] = field(default_factory=list)
    window_shares: dict[str, float] = field(default_factory=dict)
    """Attended pairs of each window case, as a share of those without the window."""
    memory: list[MemoryPoint] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the file of this machine."""
        timings = []
        for result in self.results:
            medians = {name: timing.median for name, timing in result.timings.items()}
            timings.append(
                {
                    **asdict(result),
                    "medians_s": medians,
                    "peer": result.peer,
                    "ratio": result.ratio,
                }
            )
        return {
            "format": FORMAT,
            "machine": self.machine,
            "started": self.started,
            "gemm_flops_per_s": self.gemm,
            "bandwidth_bytes_per_s": self.bandwidth,
            "freed_memory_kept": self.freed_memory_kept,
            "timings": timings,
            "window_pair_shares": self.window_shares,
            "peak_memory": [asdict(point) for point in self.memory],
        }


def start(dtypes: Sequence[torch.dtype], samples: int) -> Run:
    """A run with its machine and ceilings, and nothing timed yet."""
    run = Run(machine.describe(), datetime.now(timezone.utc).isoformat(timespec="seconds"))
    run.gemm = gemm_rates(tuple(dtypes), samples=samples)
    run.bandwidth = bandwidths(samples=samples)
    return run


def time_cases(
    run: Run,
    cases: Sequence[Benchmark],
    *,
    samples: int,
    min_sample_s: float,
    on_case: Callable[[str], None],
) -> None:
    """Time each case and add it to the run; `on_case` is told the name before.

    Freed memory stays with the process meanwhile, so that outputs reuse pages.
    """
    for case in cases:
        on_case(case.name)
        # By case, or one whose peers take many blocks would leave the next one's in pieces.
        with freed_memory_kept() as run.freed_memory_kept:
            found = measure(
                case,
                samples=samples,
                min_sample_s=min_sample_s,
                settle_rounds=SETTLE_ROUNDS if run.freed_memory_kept else 0,
            )
        run.results.append(found)
        if isinstance(case, AttentionBenchmark) and case.window is not None:
            run.window_shares[case.name] = case.share_of_full


def measure_memory(
    run: Run,
    lengths: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    heads: int,
    head_dim: int,
    on_case: Callable[[str], None],
) -> None:
    """Add the peak memory at each length, each in a process of its own."""
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for length in lengths:
            on_case(f"peak memory T{length} {name}")
            extra = peak_extra_bytes(length, heads=heads, head_dim=head_dim, dtype=dtype)
            run.memory.append(MemoryPoint(length, name, heads, head_dim, extra))
