"""Run the registry: ours and every peer alternate in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import product

import torch

from benchmarks import call_memory
from benchmarks.peak_memory import peak_extra_bytes
from resformer_kernels.bench import machine
from resformer_kernels.bench.ceilings import bandwidths, gemm_rates
from resformer_kernels.bench.fresh_pages import freed_memory_kept
from resformer_kernels.bench.timing import Benchmark, Result, Timing, Unavailable, measure
from resformer_kernels.testing.inputs import dtype_name
from resformer_kernels.testing.verification import Verdict, checks, verify

SETTLE_ROUNDS = 10
"""The limit; four or five are usually enough."""
PEER_PACKAGES = (
    *("transformers", "x-transformers", "reservoirpy", "jax", "resdag", "flash-attn"),
    *("flash-attn-3", "flash-linear-attention", "accelerated-scan"),
)
OnCase = Callable[[str], None]


@dataclass(frozen=True)
class MemoryPoint:
    """Peak memory of a forward and backward at one length, less what the inputs hold."""

    length: int
    dtype: str
    heads: int
    head_dim: int
    bytes: int
    contestant: str = "ours"


@dataclass
class Run:
    """Results of one run of the suite."""

    machine: dict[str, str | int]
    started: str
    gemm: dict[str, float] = field(default_factory=dict)
    """FLOP/s by dtype."""
    bandwidth: dict[str, float] = field(default_factory=dict)
    """Bytes a second: "read", "copy"."""
    freed_memory_kept: bool = False
    """Whether outputs reuse pages, ours and the peers' alike."""
    results: list[Result] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Cases that could not be timed, with the reason."""
    window_shares: dict[str, float] = field(default_factory=dict)
    """Attended pairs of each window case, as a share of those without the window."""
    memory: list[MemoryPoint] = field(default_factory=list)
    errors: list[Verdict] = field(default_factory=list)
    """Every tensor of the ops that were timed, against float64."""

    @property
    def compared(self) -> list[Result]:
        """The results that have a peer other than our own attention without a window."""
        return [r for r in self.results if r.name not in self.window_shares and r.peers]


def start(dtypes: Sequence[torch.dtype], samples: int) -> Run:
    """A run with its machine and ceilings, and nothing timed yet."""
    about = {**machine.describe(), **machine.versions(PEER_PACKAGES)}
    run = Run(about, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    run.gemm = gemm_rates(tuple(dtypes), samples=samples)
    run.bandwidth = bandwidths(samples=samples)
    return run


@dataclass(frozen=True)
class Settings:
    """How each case is timed."""

    samples: int
    min_sample_s: float
    peers: Sequence[str] | None = None
    """Only peers whose name contains one of these; None: all."""


def time_cases(
    run: Run, cases: Sequence[Benchmark], settings: Settings, *, on_case: OnCase
) -> None:
    """Time each case and add it to the run; `on_case` gets its name first.

    Freed memory stays with the process meanwhile, so that outputs reuse pages.
    """
    for case in cases:
        on_case(case.name)
        # Anew for each case: peers that take many blocks would fragment the next case's memory.
        with freed_memory_kept() as run.freed_memory_kept:
            try:
                found = time_case(case, settings, kept=run.freed_memory_kept)
            except Unavailable as error:
                run.left_out[case.name] = str(error)
                continue
        run.results.append(found)
        share = getattr(case, "window_share", None)
        if share is not None:
            run.window_shares[case.name] = share


def time_case(case: Benchmark, settings: Settings, *, kept: bool) -> Result:
    """One case, with the memory of a call where the system reports it.

    `kept`: freed memory stays with the process, and pages are settled before the first sample.
    """
    peak = None if call_memory.unavailable_reason() else call_memory.peak_call_bytes
    return measure(
        case,
        samples=settings.samples,
        min_sample_s=settings.min_sample_s,
        settle_rounds=SETTLE_ROUNDS if kept else 0,
        peers=settings.peers,
        peak=peak,
    )


def time_again(run: Run, case: Benchmark, settings: Settings, *, on_case: OnCase) -> None:
    """Time a case of the run once more; of each contestant the quicker timing is kept."""
    on_case(case.name)
    place = next(i for i, result in enumerate(run.results) if result.name == case.name)
    before = run.results[place].timings
    with freed_memory_kept() as kept:
        after = time_case(case, settings, kept=kept).timings
    best: dict[str, Timing] = {
        name: min(before[name], timing, key=lambda found: found.median)
        for name, timing in after.items()
    }
    run.results[place] = replace(run.results[place], timings=best)


def measure_memory(
    run: Run,
    lengths: Sequence[int],
    dtypes: Sequence[torch.dtype],
    contestants: Sequence[str],
    *,
    heads: int,
    head_dim: int,
    on_case: OnCase,
) -> None:
    """Add the peak memory at each length, each in a process of its own."""
    for contestant, dtype, length in product(contestants, dtypes, lengths):
        name = dtype_name(dtype)
        on_case(f"peak memory of {contestant} T{length} {name}")
        extra = peak_extra_bytes(
            length, heads=heads, head_dim=head_dim, dtype=dtype, contestant=contestant
        )
        run.memory.append(MemoryPoint(length, name, heads, head_dim, extra, contestant))


def measure_errors(run: Run, ops: Sequence[str], *, on_case: OnCase) -> None:
    """Compare the ops with float64."""
    on_case("errors against float64")
    for verdicts in verify([check for check in checks() if check.op in ops]):
        run.errors += verdicts
