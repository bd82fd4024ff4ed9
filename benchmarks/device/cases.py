"""What `device-check` compares with float64, and what it times beside its peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import registry
from benchmarks.device.graphs import captured
from benchmarks.workloads.common import Makers
from benchmarks.workloads.decode import DecodeBenchmark
from benchmarks.workloads.device import DEVICE_PEERS, DeviceAttention
from benchmarks.workloads.mix import MixBenchmark
from benchmarks.workloads.scan import COPY, ScanBenchmark
from resformer_kernels import linear_scan, mix_value_embedding, mix_values, reservoir_scan
from resformer_kernels.bench.timing import Benchmark
from resformer_kernels.testing.inputs import AttentionCase
from resformer_kernels.testing.kvcache import KVCacheCase
from resformer_kernels.testing.mix_checks import embedding_problem, mix_problem
from resformer_kernels.testing.reservoir_checks import ReservoirCase
from resformer_kernels.testing.scan_checks import ScanCase
from resformer_kernels.testing.verification import (
    Check,
    attention_check,
    checks,
    kvcache_check,
    problem_check,
)

SMOKE, CHECK, LARGE = "smoke", "check", "large"
"""Kinds of comparison with float64."""

FAMILIES = {
    "value_residual_attention": "attention",
    "value_residual_attention_varlen": "attention",
    "attention_with_kvcache": "decode",
    "mix_values": "mix",
    "mix_value_embedding": "embedding",
    "linear_scan": "scan",
    "reservoir_scan": "reservoir",
}
"""The kernels of each op, the most important first."""

_HALF = torch.bfloat16
_TINY = 512
"""Tiny cases are shorter by this factor."""
_LEAST = 6
"""Steps of a tiny case."""


@functools.cache
def table(kind: str, device: str, tiny: bool) -> dict[str, Check]:
    """The comparisons of a kind by name. Tiny ones try out the run itself."""
    if kind == CHECK:
        dtypes = (_HALF,) if tiny else (_HALF, torch.float16, torch.float32)
        found = checks(dtypes, device=device, attention=registry.DEVICE_CHECKS)
        if tiny:
            found = [found[0], *(check for check in found if check.op.startswith("mix"))]
    else:
        found = list({SMOKE: _smoke, LARGE: _large}[kind](device, tiny))
    return {f"{check.op}, {check.dtype}, {check.case}": check for check in found}


def _smoke(device: str, tiny: bool) -> Iterator[Check]:
    """One case of each family."""
    length = 17 if tiny else 1030
    dim = 16 if tiny else 128
    case = AttentionCase(
        dtype=_HALF,
        batch=1,
        q_len=length,
        k_len=length,
        head_dim=dim,
        value_dim=dim,
        causal=True,
        lambda_v="scalar",
        lambda_first="scalar",
    )
    yield attention_check(case, device)
    lengths = ((length, length), (1, length + 9), (20, 5))
    yield attention_check(replace(case, lengths=lengths), device)
    cached = KVCacheCase((9 * length, 5), head_dim=dim, value_dim=dim, dtype=_HALF, return_lse=True)
    yield kvcache_check(cached, device)
    scan = ScanCase("smoke", _HALF, time=_LEAST if tiny else length)
    yield from _problems(device, "smoke", (2, length, 3, 24), [scan])
    steps = _LEAST if tiny else 200
    yield from _reservoirs(
        device,
        [
            ReservoirCase(f"smoke, {mode}", torch.float32, time=steps, mode=mode)
            for mode in ("sequential", "chunked")
        ],
    )


def _problems(
    device: str, name: str, shape: tuple[int, int, int, int], scans: Sequence[ScanCase]
) -> Iterator[Check]:
    """Both mixes of values of that shape, and scans."""
    mix = partial(mix_problem, 5, _HALF, device, shape)
    yield problem_check(mix_values, f"{name}, 5 sources", _HALF, mix)
    rows = partial(embedding_problem, _HALF, device, shape, shape[1])
    yield problem_check(mix_value_embedding, name, _HALF, rows)
    for scan in scans:
        yield problem_check(linear_scan, scan.name, scan.dtype, partial(scan.problem, device))


def _reservoirs(device: str, cases: Sequence[ReservoirCase]) -> Iterator[Check]:
    for case in cases:
        yield problem_check(reservoir_scan, case.name, case.dtype, partial(case.problem, device))


def _large(device: str, tiny: bool) -> Iterator[Check]:
    """Whole grids, long sequences: what small cases cannot reach, in every op."""

    def size(length: int) -> int:
        return max(_LEAST, length // _TINY) if tiny else length

    # Of tiny ones, the first of each op.
    count = 1 if tiny else None
    heads = (4, 2, 16) if tiny else (32, 4, 128)
    for case in list(_large_attention(size))[:count]:
        if tiny:
            case = replace(case, heads=2, kv_heads=2, head_dim=16, value_dim=16)
        yield attention_check(case, device)
    for cached in list(_large_decode(size, *heads))[:count]:
        yield kvcache_check(cached, device)
    wide: dict[str, Any] = {"time": size(4096), "channels": size(1024)}
    scans = [
        ScanCase("large, gates by step", _HALF, batch=1 if tiny else 4, **wide),
        ScanCase("large, constant gates, reversed", torch.float32, True, reverse=True, **wide),
        ScanCase("large, packed", torch.float32, packed=True, **wide),
        ScanCase("large, complex gates by step", torch.complex64, **wide),
    ]
    yield from _problems(device, "large", (2, size(4096), *heads[1:]), scans[:count])
    reservoirs = [
        ReservoirCase(
            f"large, {units} units, {mode}",
            torch.float32,
            stored=stored,
            units=size(units),
            time=size(steps),
            mode=mode,
        )
        for units, steps, stored, mode in (
            (1024, 2048, torch.float32, "sequential"),
            (1024, 4096, torch.float32, "chunked"),
            (512, 2048, _HALF, "auto"),
        )
    ]
    yield from _reservoirs(device, reservoirs[:count])


def _large_attention(size: Callable[[int], int]) -> Iterator[AttentionCase]:
    scalars: dict[str, Any] = {"lambda_v": "scalar", "lambda_first": "scalar"}

    def case(heads: int, kv_heads: int, length: int, dim: int, **rest: Any) -> AttentionCase:
        given: dict[str, Any] = {"dtype": _HALF, "batch": 1, "causal": True, **scalars, **rest}
        given |= {"q_len": size(length), "k_len": size(length)}
        return AttentionCase(heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=dim, **given)

    yield case(8, 8, 8192, 128)
    yield case(16, 4, 4096, 64, batch=2, sinks=True, return_lse=True, softcap=15.0)
    yield case(4, 4, 4096, 256, causal=False, dtype=torch.float16, lambda_v="token_head")
    yield case(4, 4, 8192, 128, window=(1024, 0), lambda_v="full", lambda_first="channel")
    packed = tuple((size(q), size(k)) for q, k in ((4096, 4096), (64, 3000), (2500, 2500)))
    yield case(8, 2, 4096, 128, lengths=packed)
    yield case(8, 8, 2048, 64, bias="additive", return_mixed_value=True)
    yield case(8, 8, 4096, 128, sources="v_first")


def _large_decode(
    size: Callable[[int], int], heads: int, kv_heads: int, dim: int
) -> Iterator[KVCacheCase]:
    dims: dict[str, Any] = {"head_dim": dim, "value_dim": dim, "dtype": _HALF}
    dims |= {"heads": heads, "kv_heads": kv_heads}
    yield KVCacheCase(lengths=(size(32768), 3, size(20000)), return_lse=True, **dims)
    yield KVCacheCase(lengths=(size(16384), size(9000)), page_size=64, append="k", **dims)
    yield KVCacheCase(lengths=(size(16384), 100), quantised=torch.int8, **dims)
    yield KVCacheCase(lengths=(size(8192), 513), q_len=64, new_tokens=64, **dims)


@dataclass(frozen=True)
class Graphed:
    """A case whose contestants are each captured in a CUDA graph, as servers run decoding."""

    case: DecodeBenchmark

    @property
    def name(self) -> str:
        """The case's, and the graph."""
        return f"{self.case.name}, CUDA graphs"

    @property
    def group(self) -> str:
        """A heading of its own."""
        return "decode under CUDA graphs"

    @property
    def dtype(self) -> torch.dtype:
        """The case's."""
        return self.case.dtype

    @property
    def flops(self) -> int:
        """The case's."""
        return self.case.flops

    @property
    def bytes(self) -> int:
        """The case's."""
        return self.case.bytes

    def makers(self) -> Makers:
        """The case's, whose calls replay a graph."""
        made = self.case.makers()
        return {name: partial(captured, make, self.case.device) for name, make in made.items()}


def peer_cases(device: str, tiny: bool) -> Sequence[Benchmark]:
    """Eight cases beside their peers, most important first."""
    tokens, length = (32, 32) if tiny else (16384, 4096)
    width = 32 if tiny else 2048

    def attention(direction: str, dim: int, groups: int = 1) -> DeviceAttention:
        dim = dim // 8 if tiny else dim
        heads = width // dim * groups
        shape = (tokens // length, heads, heads // groups, length, dim)
        return DeviceAttention(*shape, _HALF, direction, peers=DEVICE_PEERS, device=device)

    def decode(dim: int, *, shared: bool) -> Graphed:
        shape = (2, 4, 2, 64, 16) if tiny else (8, 32, 8, 8192, dim)
        layers = 2 if tiny else 12
        return Graphed(DecodeBenchmark(*shape, _HALF, shared, layers, device=device))

    scan = (1, _LEAST, 32) if tiny else registry.SCAN_SHAPE
    mixed = (2, 16) if tiny else (16, 128)
    return [
        attention("forward", 128),
        attention("backward", 128),
        decode(128, shared=False),
        attention("backward", 64),
        attention("forward", 128, groups=4),
        ScanBenchmark(*scan, _HALF, "forward", peers=(COPY,), device=device),
        MixBenchmark(2, 1, tokens, *mixed, _HALF, "forward", device=device),
        decode(64, shared=True),
    ]
