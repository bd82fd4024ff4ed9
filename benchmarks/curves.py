"""Cases that differ in one size, for curves: time and memory over lengths, units and contexts."""

from __future__ import annotations

import torch

from benchmarks.workloads.attention import MATH, CPUAttention
from benchmarks.workloads.decode import DecodeBenchmark
from benchmarks.workloads.reservoir import ReservoirBenchmark
from benchmarks.workloads.scan import PEERS, ScanBenchmark
from resformer_kernels.bench.attention import SDPA
from resformer_kernels.bench.timing import Benchmark

CURVE_LENGTHS = (512, 1024, 2048, 4096, 8192)
CURVE_HEADS, CURVE_HEAD_DIM = 4, 64

GRID_LENGTHS = {1: (1024, 4096, 16384, 65536), 8: (1024, 8192), 32: (1024, 2048)}
"""Tokens in each cache, by batch: at most 1.6 GB of keys and values over the layers."""
GRID_GROUPS = (1, 4, 8)
GRID_KV_HEADS, GRID_HEAD_DIM = 8, 64
SCAN_CURVE = (
    *((1, length, 1024) for length in (512, 2048, 32768)),
    *((1, 8192, channels) for channels in (64, 256, 4096)),
)
"""Batch, length, channels; the registry has (1, 8192, 1024), which lies on both curves."""

RESERVOIR_UNITS, RESERVOIR_CURVE_LENGTH = (128, 256, 512, 1024, 2048), 4096
RESERVOIR_LENGTHS, RESERVOIR_CURVE_UNITS = (1024, 65536), 256


def attention() -> list[Benchmark]:
    """How time and memory grow with the length; the scores of plain mathematics with its square."""
    return [
        CPUAttention(
            *(1, CURVE_HEADS, CURVE_HEADS, length, CURVE_HEAD_DIM),
            torch.bfloat16,
            direction,
            peers=(*SDPA, MATH),
        )
        for direction in ("forward", "backward")
        for length in CURVE_LENGTHS
    ]


def decode_grid() -> list[DecodeBenchmark]:
    """Every size of query group at every length, with a V a layer and with one V for all."""
    return [
        DecodeBenchmark(
            *(batch, group * GRID_KV_HEADS, GRID_KV_HEADS, length, GRID_HEAD_DIM),
            torch.bfloat16,
            shared,
        )
        for group in GRID_GROUPS
        for batch, lengths in GRID_LENGTHS.items()
        for length in lengths
        for shared in (False, True)
    ]


def scan() -> list[Benchmark]:
    """How the rate depends on the length, and on the channels."""
    return [ScanBenchmark(*shape, torch.float32, "forward", peers=PEERS) for shape in SCAN_CURVE]


def reservoir() -> list[Benchmark]:
    """How the time of a step depends on units, and on the length."""
    by_units = ((units, RESERVOIR_CURVE_LENGTH) for units in RESERVOIR_UNITS)
    by_length = ((RESERVOIR_CURVE_UNITS, length) for length in RESERVOIR_LENGTHS)
    return [ReservoirBenchmark(units, 1, length) for units, length in (*by_units, *by_length)]
