"""Cases that differ in one size, for curves: time and memory over lengths, units and contexts."""

from __future__ import annotations

import torch

from benchmarks.workloads.attention import MATH, CPUAttention
from benchmarks.workloads.decode import DecodeBenchmark
from benchmarks.workloads.reservoir import ReservoirBenchmark
from benchmarks.workloads.scan import PEERS, ScanBenchmark
from resformer_kernels.bench.attention import SDPA
from resformer_kernels.bench.timing import Benchmark

LENGTHS = (512, 1024, 2048, 4096, 8192)
HEADS, KV_HEADS, HEAD_DIM = 4, 8, 64
"""Heads of attention, KV heads of decoding, and what both have."""

DECODE_LENGTHS = {1: (1024, 4096, 16384, 65536), 8: (1024, 8192), 32: (1024, 2048)}
"""Tokens in each cache, by batch: at most 1.6 GB of keys and values over the layers."""
DECODE_GROUPS = (1, 4, 8)

SCAN_SHAPES = (
    *((1, length, 1024) for length in (512, 2048, 32768)),
    *((1, 8192, channels) for channels in (64, 256, 4096)),
)
"""Batch, length, channels; the registry has (1, 8192, 1024), which lies on both curves."""

RESERVOIR_UNITS, RESERVOIR_LENGTH = 256, 4096
"""The units of the curve over lengths, and the length of the curve over units."""
RESERVOIR_SHAPES = (
    *((units, RESERVOIR_LENGTH) for units in (128, 256, 512, 1024, 2048)),
    *((RESERVOIR_UNITS, length) for length in (1024, 65536)),
)


def attention() -> list[Benchmark]:
    """How time and memory grow with the length; those of plain scores grow with its square."""
    shapes = [(1, HEADS, HEADS, length, HEAD_DIM) for length in LENGTHS]
    return [
        CPUAttention(*shape, torch.bfloat16, direction, peers=(*SDPA, MATH))
        for direction in ("forward", "backward")
        for shape in shapes
    ]


def decode_grid() -> list[DecodeBenchmark]:
    """Every size of query group at every length, with a V in each layer and with one V for all."""
    return [
        DecodeBenchmark(batch, group * KV_HEADS, KV_HEADS, length, HEAD_DIM, torch.bfloat16, shared)
        for group in DECODE_GROUPS
        for batch, lengths in DECODE_LENGTHS.items()
        for length in lengths
        for shared in (False, True)
    ]


def scan() -> list[Benchmark]:
    """How the rate depends on the length, and on the channels."""
    return [ScanBenchmark(*shape, torch.float32, "forward", peers=PEERS) for shape in SCAN_SHAPES]


def reservoir() -> list[Benchmark]:
    """How the time of a step depends on the units, and on the length."""
    return [ReservoirBenchmark(units, 1, length) for units, length in RESERVOIR_SHAPES]


def every() -> list[Benchmark]:
    """Every case that is a point of a curve."""
    return [*attention(), *decode_grid(), *scan(), *reservoir()]
