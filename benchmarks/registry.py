"""Every case, as data. Inputs, bytes, FLOPs and peers are in `resformer_kernels.bench.workloads`.

Names are stable: results are compared by them.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from benchmarks import curves
from benchmarks.workloads.decode import DecodeBenchmark
from benchmarks.workloads.device import DeviceAttention
from benchmarks.workloads.model import ModelBenchmark
from benchmarks.workloads.reservoir import ReservoirBenchmark
from benchmarks.workloads.scan import COPY, ScanBenchmark
from benchmarks.workloads.scan import PEERS as SCAN_PEERS
from resformer_kernels.bench.attention import PEERS, QUICK, AttentionBenchmark
from resformer_kernels.bench.timing import Benchmark
from resformer_kernels.bench.workloads import EmbeddingBenchmark, MixBenchmark
from resformer_kernels.testing.inputs import REPRESENTATIVE, AttentionCase

DeviceCase: TypeAlias = (
    DeviceAttention
    | MixBenchmark
    | EmbeddingBenchmark
    | ScanBenchmark
    | ReservoirBenchmark
    | DecodeBenchmark
)

SUITES = {
    "attention": ("value_residual_attention", "value_residual_attention_varlen"),
    "window": (),
    "mix": ("mix_values", "mix_value_embedding"),
    "decode": ("attention_with_kvcache",),
    "scan": ("linear_scan",),
    "reservoir": ("reservoir_scan",),
}
"""The first word of its cases' groups, and the ops whose errors are measured with it."""

DTYPES = (torch.bfloat16, torch.float32)
DIRECTIONS = ("forward", "backward")

ATTENTION_SHAPES = (
    (1, 16, 16, 4096, 64),
    (1, 8, 8, 2048, 128),
    (1, 16, 4, 4096, 64),
    (8, 8, 8, 256, 64),
)
"""Batch, query heads, KV heads, length, head_dim."""

QUICK_SHAPES = ((1, 16, 16, 1024, 64), (8, 8, 8, 256, 64))

WINDOW_SHAPE = (1, 4, 4, 16384, 64)
WINDOW = 512

DECODE_SHAPES = (
    (1, 32, 8, 8192, 128),
    (8, 16, 8, 1024, 64),
    (1, 8, 8, 4096, 128),
    (32, 16, 4, 1024, 64),
    (1, 64, 8, 65536, 64),
)
"""Batch, query heads, KV heads, tokens in the cache, head_dim; the first two in float32 too."""
SHARED_SHAPES = ((1, 8, 8, 8192, 64), (1, 16, 8, 8192, 64), (1, 32, 8, 8192, 64))
"""A V of 8 MiB, which a last-level cache can hold."""
MODEL_SHAPES = ((1, 8192), (8, 1024))
"""Batch and tokens in the cache of whole models."""

MEMORY_LENGTHS = (4096, 8192, 16384, 32768)
MEMORY_HEADS, MEMORY_HEAD_DIM = 2, 64


def attention(
    shapes: tuple[tuple[int, int, int, int, int], ...], peers: tuple[str, ...] = PEERS
) -> list[Benchmark]:
    """Causal attention, forward then backward, against what else mixes and attends."""
    return [
        AttentionBenchmark(*shape, dtype, direction, peers=peers)
        for direction in DIRECTIONS
        for shape in shapes
        for dtype in DTYPES
    ]


def window() -> list[Benchmark]:
    """A short window in a long sequence, against our own attention without it."""
    return [AttentionBenchmark(*WINDOW_SHAPE, dtype, "forward", window=WINDOW) for dtype in DTYPES]


def mix(length: int) -> list[Benchmark]:
    """`mix_values` and `mix_value_embedding` against PyTorch expressions."""
    found: list[Benchmark] = []
    for direction in DIRECTIONS:
        for dtype in DTYPES:
            found += [
                MixBenchmark(sources, 1, length, 16, 64, dtype, direction) for sources in (2, 8)
            ]
            found.append(EmbeddingBenchmark(32768, 1, length, 16, 64, dtype, direction))
    return found


SCAN_SHAPE, SCAN_PEER_SHAPE, QUICK_SCAN_SHAPE = (4, 16384, 1024), (1, 8192, 1024), (1, 1024, 256)
"""Batch, length, channels: against a copy; against torch, which takes seconds for the first."""


def scan(
    shape: tuple[int, int, int], peers: tuple[str, ...], directions: tuple[str, ...] = DIRECTIONS
) -> list[Benchmark]:
    """`linear_scan` with gates by step and with constant ones, real and complex."""
    forms = ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False))
    found: list[Benchmark] = [
        ScanBenchmark(*shape, dtype, direction, constant, peers)
        for direction in directions
        for dtype, constant in forms
    ]
    # A complex number is two floats: as many bytes.
    batch, length, channels = shape
    complex_shape = (batch, length, channels // 2)
    found += [
        ScanBenchmark(*complex_shape, torch.complex64, direction, True, peers)
        for direction in directions
    ]
    return found


def scans() -> list[Benchmark]:
    """Against a copy of as many bytes, and against torch's loop and its parallel scan."""
    return [
        *scan(SCAN_SHAPE, (COPY,)),
        *scan(SCAN_PEER_SHAPE, SCAN_PEERS),
        *curves.scan(),
    ]


def reservoirs(length: int) -> list[Benchmark]:
    """`reservoir_scan`: one sequence, a batch, bfloat16 weights, sparse weights, gradients."""
    return [
        ReservoirBenchmark(256, 1, length),
        ReservoirBenchmark(1024, 1, length),
        ReservoirBenchmark(1024, 1, length, torch.bfloat16),
        ReservoirBenchmark(1024, 1, length, sparse=True),
        ReservoirBenchmark(1024, 32, length // 32),
        ReservoirBenchmark(256, 1, length // 4, direction="backward"),
        ReservoirBenchmark(1024, 8, length // 16, direction="backward"),
    ]


def decode(*, quick: bool = False) -> list[Benchmark]:
    """One token through 12 layers: a V a layer, against torch, and one V, against that; and through
    models of transformers."""
    if quick:
        return [DecodeBenchmark(1, 16, 8, 1024, 64, dtype) for dtype in DTYPES]
    found: list[Benchmark] = []
    for i, shape in enumerate(DECODE_SHAPES):
        dtypes = DTYPES if i < 2 else DTYPES[:1]
        found += [DecodeBenchmark(*shape, dtype) for dtype in dtypes]
    found += [DecodeBenchmark(*shape, torch.bfloat16, shared=True) for shape in SHARED_SHAPES]
    found += [
        ModelBenchmark(*shape, dtype, shared)
        for shared in (False, True)
        for shape in MODEL_SHAPES
        for dtype in DTYPES
    ]
    return [*found, *curves.decode_grid()]


def cases(*, quick: bool = False) -> list[Benchmark]:
    """Every case, or the short ones alone."""
    if quick:
        return [
            *attention(QUICK_SHAPES, QUICK),
            *mix(1024),
            *decode(quick=True),
            *scan(QUICK_SCAN_SHAPE, SCAN_PEERS),
            *reservoirs(4096),
        ]
    every = [
        *attention(ATTENTION_SHAPES),
        *curves.attention(),
        *window(),
        *mix(4096),
        *decode(),
        *scans(),
        *reservoirs(16384),
        *curves.reservoir(),
    ]
    # A shape may stand in a list of its own and in a grid; the first one counts.
    unique: dict[str, Benchmark] = {}
    for case in every:
        unique.setdefault(case.name, case)
    return list(unique.values())


def memory_lengths(*, quick: bool = False) -> tuple[int, ...]:
    """Lengths at which peak memory is measured, each twice the one before."""
    return MEMORY_LENGTHS[:2] if quick else MEMORY_LENGTHS


DEVICE_TOKENS = 16384
DEVICE_LENGTHS = (4096, 16384, 8192, 2048, 1024, 512)
"""In order of importance: a run that is short of time measures the first ones."""
DEVICE_HEAD_DIMS = (128, 64, 256)
DEVICE_WIDTH = 2048
"""Heads times head_dim: the shapes that FlashAttention's papers quote."""
DEVICE_GROUPED_HEADS, DEVICE_GROUPED_LENGTHS = (64, 8), (4096, 16384, 1024)
FLEX_LENGTHS = (4096, 16384)
"""Where FlexAttention takes part: each shape compiles for seconds."""

DEVICE_CHECKS: tuple[AttentionCase, ...] = (
    *REPRESENTATIVE,
    *(
        AttentionCase(
            dtype=dtype,
            batch=1,
            q_len=1030,
            k_len=1030,
            head_dim=dim,
            value_dim=dim,
            causal=causal,
            lambda_v="scalar",
            lambda_first="scalar",
        )
        for dim in DEVICE_HEAD_DIMS
        for causal in (True, False)
        for dtype in (torch.bfloat16, torch.float16)
    ),
    AttentionCase(
        dtype=torch.bfloat16,
        heads=16,
        q_len=1000,
        k_len=1300,
        head_dim=128,
        value_dim=128,
        window=(256, 0),
        lambda_v="token_head",
        lambda_first="channel",
    ),
    AttentionCase(
        dtype=torch.bfloat16,
        head_dim=64,
        value_dim=64,
        lengths=((700, 700), (1, 900), (300, 20), (129, 129)),
        causal=True,
        lambda_v="scalar",
    ),
)
"""What `device-check` holds against float64 beside the mixes: every argument, and whole tiles."""


def device_attention(device: str) -> list[DeviceAttention]:
    """Causal and full attention at one count of tokens, most important first."""
    shapes = [
        (DEVICE_WIDTH // dim, DEVICE_WIDTH // dim, length, dim)
        for length in DEVICE_LENGTHS
        for dim in DEVICE_HEAD_DIMS
    ]
    heads, kv_heads = DEVICE_GROUPED_HEADS
    grouped = [(heads, kv_heads, length, 128) for length in DEVICE_GROUPED_LENGTHS]
    # After the first lengths of plain attention.
    shapes[6:6] = grouped[:2]
    return [
        DeviceAttention(
            DEVICE_TOKENS // length,
            *(query_heads, key_heads, length, dim),
            torch.bfloat16,
            direction,
            causal,
            device,
            flex=length in FLEX_LENGTHS,
        )
        for query_heads, key_heads, length, dim in (*shapes, *grouped[2:])
        for causal in (True, False)
        for direction in DIRECTIONS
    ]


def device_mix(device: str) -> list[DeviceCase]:
    """The mixes, at the same count of tokens."""
    found: list[DeviceCase] = []
    for direction in DIRECTIONS:
        found += [
            MixBenchmark(
                sources, 1, DEVICE_TOKENS, 16, 128, torch.bfloat16, direction, device=device
            )
            for sources in (2, 8)
        ]
        found.append(
            EmbeddingBenchmark(
                32768, 1, DEVICE_TOKENS, 16, 128, torch.bfloat16, direction, device=device
            )
        )
    return found


def device_scan(device: str) -> list[DeviceCase]:
    """`linear_scan` against a copy of as many bytes."""
    return [
        ScanBenchmark(*SCAN_SHAPE, dtype, direction, constant, (COPY,), device)
        for direction in DIRECTIONS
        for dtype in DTYPES
        for constant in (False, True)
    ]


def device_reservoirs(device: str) -> list[DeviceCase]:
    """`reservoir_scan` in both modes, bfloat16 weights, sparse weights, a batch."""
    one = (1, DEVICE_TOKENS)
    found: list[DeviceCase] = [
        ReservoirBenchmark(units, *one, mode=mode, device=device)
        for units in (1024, 256)
        for mode in ("chunked", "sequential")
    ]
    return [
        *found,
        ReservoirBenchmark(1024, *one, torch.bfloat16, device=device),
        ReservoirBenchmark(1024, *one, sparse=True, device=device),
        ReservoirBenchmark(1024, 32, DEVICE_TOKENS // 32, device=device),
    ]


def device_decode(device: str) -> list[DeviceCase]:
    """One token through 12 layers, a V a layer and one V."""
    found: list[DeviceCase] = [
        DecodeBenchmark(*shape, torch.bfloat16, device=device) for shape in DECODE_SHAPES
    ]
    shared = [
        DecodeBenchmark(*shape, torch.bfloat16, shared=True, device=device)
        for shape in SHARED_SHAPES
    ]
    return [*found, *shared]


def device_cases(device: str, *, tiny: bool = False) -> list[DeviceCase]:
    """Every case of a GPU, most important first; `tiny` ones try out the run itself."""
    if not tiny:
        attention = device_attention(device)
        # Half of attention first, so that a short run has both.
        middle = len(attention) // 2
        small = [*device_mix(device), *device_scan(device)]
        small += [*device_reservoirs(device), *device_decode(device)]
        return [*attention[:middle], *small, *attention[middle:]]
    found: list[DeviceCase] = [
        DeviceAttention(1, 2, 1, 64, 16, torch.bfloat16, direction, True, device)
        for direction in DIRECTIONS
    ]
    found.append(MixBenchmark(2, 1, 64, 2, 16, torch.bfloat16, "forward", device=device))
    return found
