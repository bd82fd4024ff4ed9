"""Layouts of the peers beside the registered ones: a peer is timed in the best that its users have.

`slower_than_elsewhere` times the peers of a case against these; `pytest --check-layouts` runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.workloads import attention, decode, epilogue, reservoir, scan
from benchmarks.workloads.common import COMPILED, compiled
from benchmarks.workloads.mix import MixBenchmark
from resformer_kernels.bench.attention import mix_and_sdpa
from resformer_kernels.bench.fresh_pages import freed_memory_kept
from resformer_kernels.bench.timing import Benchmark, Call, Unavailable, alternate

MOST_GAIN = 0.10
"""By how much a peer may be quicker in a layout that is not registered."""


class Alternative(NamedTuple):
    """A layout of a peer: `names` are its registered ones."""

    names: tuple[str, ...]
    label: str
    make: Callable[[], Call]


def alternatives(case: Benchmark) -> list[Alternative]:
    """The other layouts of the peers of a case on a CPU."""
    kinds: tuple[tuple[type, Callable[[Any], list[Alternative]]], ...] = (
        (epilogue.EpilogueBenchmark, _epilogue),
        (attention.CPUAttention, _attention),
        (decode.DecodeBenchmark, _decode),
        (reservoir.ReservoirBenchmark, _reservoir),
        (scan.ScanBenchmark, _scan),
        (MixBenchmark, _mix),
    )
    names = case.makers()
    found = next((make(case) for kind, make in kinds if isinstance(case, kind)), [])
    return [each for each in found if any(name in names for name in each.names)]


def _attention(case: attention.CPUAttention) -> list[Alternative]:
    def heads_first() -> Call:
        return case.sdpa(compiled(mix_and_sdpa), heads_first=True)

    return [Alternative((COMPILED,), "(B,H,T,D)", heads_first)]


def _epilogue(case: epilogue.EpilogueBenchmark) -> list[Alternative]:
    def heads_first() -> Call:
        return case.sdpa(compiled(epilogue.sdpa_and_passes), heads_first=True)

    return [Alternative((COMPILED,), "(B,H,T,D)", heads_first)]


def _decode(case: decode.DecodeBenchmark) -> list[Alternative]:
    if case.shared:
        return []

    def make(way: Callable[..., Call]) -> Call:
        return way(case.query(), case.caches, length_first)

    return [
        Alternative((name, name + decode.TIME_FIRST), "(T,B,H,D)", partial(make, way))
        for name, way in ((decode.GQA, case._gqa), (decode.FOLDED, case._folded))
    ]


def length_first(caches: list[Tensor]) -> list[Tensor]:
    """(B, H, T, D) views, in memory (T, B, H, D), of caches (B, T, H, D)."""
    return [cache.transpose(0, 1).contiguous().permute(1, 2, 0, 3) for cache in caches]


def _reservoir(case: reservoir.ReservoirBenchmark) -> list[Alternative]:
    python = (reservoir.RESERVOIRPY,)
    return [
        Alternative(python, "float32", partial(case._reservoirpy, "float32")),
        Alternative(python, "dense W", partial(case._reservoirpy, dense=True)),
        Alternative((reservoir.JAX,), "its own sparse W", partial(case._jax, own_sparse=True)),
        Alternative((reservoir.RNN,), "(T,B,1)", partial(case._rnn, batch_first=False)),
        *(
            Alternative((reservoir.RESDAG,), f"sparse={kept}", partial(case._resdag, sparse=kept))
            for kept in (True, False)
        ),
    ]


def _scan(case: scan.ScanBenchmark) -> list[Alternative]:
    def by_association() -> Call:
        given = case.arguments()
        case._peer(scan.ASSOCIATIVE)  # absent here where it is there
        return case.call(partial(scan.scan_by_association, dim=2), scan.time_last(*given))

    def by_loop() -> Call:
        gates, tokens = case.arguments()
        by_step = [x if x.dim() == 1 else x.transpose(0, 1).contiguous() for x in (gates, tokens)]
        return case.call(_loop_time_first, by_step)

    return [
        Alternative((scan.ASSOCIATIVE,), "(B,N,T)", by_association),
        Alternative((scan.LOOP,), "(T,B,N)", by_loop),
    ]


def _loop_time_first(gates: Tensor, tokens: Tensor) -> Tensor:
    given = gates if gates.dim() == 1 else gates.transpose(0, 1)
    return scan.scan_by_loop(given, tokens.transpose(0, 1))


def _mix(case: MixBenchmark) -> list[Alternative]:
    def heads_first() -> Call:
        values, coefficients = case.arguments()
        turned = [value.transpose(1, 2).contiguous() for value in values]
        return case.call(compiled(type(case).peers["sum of products"]), (turned, coefficients))

    return [Alternative((COMPILED,), "(B,H,T,D)", heads_first)]


def slower_than_elsewhere(
    case: Benchmark, others: list[Alternative], *, samples: int = 5
) -> dict[str, float]:
    """How many times quicker each of `others` is than the best registered layout of its peer, by
    peer and layout; those that this machine cannot run are left out."""
    makers, found = case.makers(), {}
    for names, label, make in others:
        registered = {name: _made(makers[name]) for name in names if name in makers}
        other = _made(make)
        calls = {name: call for name, call in registered.items() if call is not None}
        if other is None or not calls:
            continue
        with freed_memory_kept():
            timings = alternate({**calls, label: other}, samples=samples, min_sample_s=0.02)
        best = min(timings[name].median for name in calls)
        found[f"{names[0]}: {label}"] = best / timings[label].median
    return found


def _made(make: Callable[[], Call]) -> Call | None:
    try:
        call = make()
        call()
    except Unavailable:
        return None
    return call
