"""Every case, as data. Inputs, bytes, FLOPs and peers are in `resformer_kernels.testing.workloads`.

Names are stable: results are compared by them.
"""

from __future__ import annotations

import torch

from resformer_kernels.testing.timing import Benchmark
from resformer_kernels.testing.workloads import (
    AttentionBenchmark,
    EmbeddingBenchmark,
    MixBenchmark,
)

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

MEMORY_LENGTHS = (4096, 8192, 16384, 32768)
MEMORY_HEADS, MEMORY_HEAD_DIM = 2, 64


def attention(shapes: tuple[tuple[int, int, int, int, int], ...]) -> list[Benchmark]:
    """Causal attention, forward then backward, against SDPA with the mix in front of it."""
    return [
        AttentionBenchmark(*shape, dtype, direction)
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


def cases(*, quick: bool = False) -> list[Benchmark]:
    """Every case, or the short ones alone."""
    if quick:
        return [*attention(QUICK_SHAPES), *mix(1024)]
    return [*attention(ATTENTION_SHAPES), *window(), *mix(4096)]


def memory_lengths(*, quick: bool = False) -> tuple[int, ...]:
    """Lengths at which peak memory is measured, each twice the one before."""
    return MEMORY_LENGTHS[:2] if quick else MEMORY_LENGTHS
