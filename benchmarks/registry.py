"""Every case, as data. Inputs, bytes, FLOPs and peers are in `benchmarks.workloads`.

Names are stable: results are compared by them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from benchmarks import curves
from benchmarks.workloads.attention import PEERS, QUICK, CPUAttention
from benchmarks.workloads.decode import DecodeBenchmark
from benchmarks.workloads.device import DEVICE_PEERS, FLEX, DeviceAttention
from benchmarks.workloads.epilogue import EpilogueBenchmark
from benchmarks.workloads.mix import EmbeddingBenchmark, MixBenchmark
from benchmarks.workloads.model import ModelBenchmark
from benchmarks.workloads.reservoir import ReservoirBenchmark
from benchmarks.workloads.scan import COPY, ScanBenchmark
from benchmarks.workloads.scan import PEERS as SCAN_PEERS
from resformer_kernels.bench.timing import Benchmark
from resformer_kernels.testing.inputs import REPRESENTATIVE, AttentionCase

SUITES = {
    "attention": ("value_residual_attention", "value_residual_attention_varlen"),
    "exclusive": (),
    "window": (),
    "mix": ("mix_values", "mix_value_embedding"),
    "decode": ("attention_with_kvcache",),
    "scan": ("linear_scan",),
    "reservoir": ("reservoir_scan",),
}
"""Ops whose errors are measured with a suite; its name is the first word of its groups."""

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

SCAN_SHAPE, SCAN_PEER_SHAPE, QUICK_SCAN_SHAPE = (4, 16384, 1024), (1, 8192, 1024), (1, 1024, 256)
"""Batch, length, channels: against a copy; against torch, which takes seconds for the first."""

MEMORY_LENGTHS = (4096, 8192, 16384, 32768)
MEMORY_HEADS, MEMORY_HEAD_DIM = 2, 64


def attention(
    shapes: tuple[tuple[int, int, int, int, int], ...], peers: tuple[str, ...] = PEERS
) -> list[Benchmark]:
    """Causal attention, forward then backward, against everything else that mixes and attends."""
    return [
        CPUAttention(*shape, dtype, direction, peers=peers)
        for direction, shape, dtype in product(DIRECTIONS, shapes, DTYPES)
    ]


def exclusive(shapes: tuple[tuple[int, int, int, int, int], ...]) -> list[Benchmark]:
    """The same with exclusive outputs and a gate, against those as passes of their own."""
    return [
        EpilogueBenchmark(*shape, dtype, direction)
        for direction, shape, dtype in product(DIRECTIONS, shapes, DTYPES)
    ]


def mix(
    length: int,
    head_dim: int = 64,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    device: str = "cpu",
    *,
    compiles: bool = True,
) -> list[Benchmark]:
    """`mix_values` of two and eight sources, and `mix_value_embedding`, by PyTorch expressions."""
    sizes = (1, length, 16, head_dim)
    return [
        kind(count, *sizes, dtype, direction, device=device, compiles=compiles)
        for direction, dtype in product(DIRECTIONS, dtypes)
        for kind, count in ((MixBenchmark, 2), (MixBenchmark, 8), (EmbeddingBenchmark, 32768))
    ]


def scan(shape: tuple[int, int, int], peers: tuple[str, ...]) -> list[Benchmark]:
    """`linear_scan` with gates by step and with constant ones, real and complex."""
    batch, length, channels = shape
    real = ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False))
    forms = [(channels, *form) for form in real]
    # A complex number is two floats: as many bytes.
    complex_forms = [(channels // 2, torch.complex64, True)]
    return [
        ScanBenchmark(batch, length, width, dtype, direction, constant, peers)
        for those in (forms, complex_forms)
        for direction, (width, dtype, constant) in product(DIRECTIONS, those)
    ]


def reservoirs(length: int) -> list[Benchmark]:
    """`reservoir_scan`: one sequence, a batch, bfloat16 weights, sparse weights, gradients."""
    return [
        ReservoirBenchmark(256, 1, length),
        ReservoirBenchmark(1024, 1, length),
        ReservoirBenchmark(1024, 1, length, torch.bfloat16),
        ReservoirBenchmark(1024, 1, length, sparse=True),
        ReservoirBenchmark(1024, 1, length, sparse=True, module=True),
        ReservoirBenchmark(1024, 32, length // 32),
        ReservoirBenchmark(256, 1, length // 4, direction="backward"),
        ReservoirBenchmark(1024, 8, length // 16, direction="backward"),
    ]


def shared_decode(device: str = "cpu") -> list[DecodeBenchmark]:
    """One token through 12 layers that read one V, against a V a layer."""
    return [
        DecodeBenchmark(*shape, torch.bfloat16, shared=True, device=device)
        for shape in SHARED_SHAPES
    ]


def decode() -> list[Benchmark]:
    """One token through 12 layers: a V a layer, against torch, in our layout and in that of a
    `StaticCache`, and one V, against a V a layer; and through models of transformers."""
    return [
        *(
            DecodeBenchmark(*shape, dtype)
            for place, shape in enumerate(DECODE_SHAPES)
            for dtype in (DTYPES if place < 2 else DTYPES[:1])
        ),
        *(
            replace(DecodeBenchmark(*shape, dtype), heads_first=True)
            for shape in DECODE_SHAPES[:2]
            for dtype in DTYPES
        ),
        *shared_decode(),
        *(
            ModelBenchmark(*shape, dtype, shared)
            for shared, shape, dtype in product((False, True), MODEL_SHAPES, DTYPES)
        ),
        *curves.decode_grid(),
    ]


def cases(*, quick: bool = False) -> list[Benchmark]:
    """Every case, or the short ones alone."""
    if quick:
        return [
            *attention(QUICK_SHAPES, QUICK),
            *exclusive(QUICK_SHAPES[1:]),
            *mix(1024, compiles=False),
            *(DecodeBenchmark(1, 16, 8, 1024, 64, dtype) for dtype in DTYPES),
            *scan(QUICK_SCAN_SHAPE, SCAN_PEERS),
            *reservoirs(4096),
        ]
    every = [
        *attention(ATTENTION_SHAPES),
        *exclusive(ATTENTION_SHAPES),
        *curves.attention(),
        # A short window in a long sequence, against our own attention without it.
        *(CPUAttention(*WINDOW_SHAPE, dtype, "forward", window=WINDOW) for dtype in DTYPES),
        *mix(4096),
        *decode(),
        # Against a copy of as many bytes, and against torch's loop and its parallel scan.
        *scan(SCAN_SHAPE, (COPY,)),
        *scan(SCAN_PEER_SHAPE, SCAN_PEERS),
        *curves.scan(),
        *reservoirs(16384),
        *curves.reservoir(),
    ]
    # Some shapes are in a list and in a grid; the first one counts.
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
"""Lengths at which FlexAttention is timed: each shape compiles for seconds."""

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
        for dim, causal, dtype in product(
            DEVICE_HEAD_DIMS, (True, False), (torch.bfloat16, torch.float16)
        )
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
"""Attention cases of `device-check` against float64: every argument, and whole tiles."""


def device_attention(device: str) -> list[DeviceAttention]:
    """Causal and full attention at one count of tokens, most important first."""
    shapes = [
        (DEVICE_WIDTH // dim, DEVICE_WIDTH // dim, length, dim)
        for length, dim in product(DEVICE_LENGTHS, DEVICE_HEAD_DIMS)
    ]
    grouped = [(*DEVICE_GROUPED_HEADS, length, 128) for length in DEVICE_GROUPED_LENGTHS]
    # After the first lengths of plain attention.
    shapes[6:6] = grouped[:2]
    return [
        DeviceAttention(
            *(DEVICE_TOKENS // length, heads, kv_heads, length, dim),
            torch.bfloat16,
            direction,
            peers=(*DEVICE_PEERS, FLEX) if length in FLEX_LENGTHS else DEVICE_PEERS,
            causal=causal,
            device=device,
        )
        for heads, kv_heads, length, dim in (*shapes, *grouped[2:])
        for causal, direction in product((True, False), DIRECTIONS)
    ]


def device_reservoirs(device: str) -> list[ReservoirBenchmark]:
    """`reservoir_scan` in both modes, bfloat16 weights, sparse weights, a batch."""
    one = (1, DEVICE_TOKENS)
    return [
        *(
            ReservoirBenchmark(units, *one, mode=mode, device=device)
            for units, mode in product((1024, 256), ("chunked", "sequential"))
        ),
        ReservoirBenchmark(1024, *one, torch.bfloat16, device=device),
        ReservoirBenchmark(1024, *one, sparse=True, device=device),
        ReservoirBenchmark(1024, 32, DEVICE_TOKENS // 32, device=device),
    ]


def device_cases(device: str, *, tiny: bool = False) -> list[Benchmark]:
    """Every case of a GPU, most important first; `tiny` ones try out the run itself."""
    if tiny:
        return [
            *(
                DeviceAttention(1, 2, 1, 64, 16, torch.bfloat16, direction, device=device)
                for direction in DIRECTIONS
            ),
            MixBenchmark(2, 1, 64, 2, 16, torch.bfloat16, "forward", device=device),
        ]
    attention = device_attention(device)
    # Half of attention first, so that a short run has both.
    middle = len(attention) // 2
    return [
        *attention[:middle],
        *mix(DEVICE_TOKENS, 128, (torch.bfloat16,), device),
        *(
            ScanBenchmark(*SCAN_SHAPE, dtype, direction, constant, (COPY,), device)
            for direction, dtype, constant in product(DIRECTIONS, DTYPES, (False, True))
        ),
        *device_reservoirs(device),
        *(DecodeBenchmark(*shape, torch.bfloat16, device=device) for shape in DECODE_SHAPES),
        *shared_decode(device),
        *attention[middle:],
    ]
