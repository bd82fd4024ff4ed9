"""Modules built on the ops: attention, value mixes, rotary embedding, reservoirs and readouts."""

from resformer_kernels.nn.attention import ValueResidualAttention
from resformer_kernels.nn.reservoir import Reservoir
from resformer_kernels.nn.reservoir_memory import AttentionReadout, ReservoirMemory
from resformer_kernels.nn.ridge import Ridge
from resformer_kernels.nn.rls import RLS
from resformer_kernels.nn.rotary import RotaryEmbedding, apply_rotary
from resformer_kernels.nn.stability import StabilityReport, stability_report
from resformer_kernels.nn.value_mix import (
    DenseMix,
    EmbeddingMix,
    FirstValues,
    FixedMix,
    LearnedMix,
    OwnValues,
    ValueMix,
)

__all__ = [
    "RLS",
    "AttentionReadout",
    "DenseMix",
    "EmbeddingMix",
    "FirstValues",
    "FixedMix",
    "LearnedMix",
    "OwnValues",
    "Reservoir",
    "ReservoirMemory",
    "Ridge",
    "RotaryEmbedding",
    "StabilityReport",
    "ValueMix",
    "ValueResidualAttention",
    "apply_rotary",
    "stability_report",
]
