"""Kernels for value-residual attention (Zhou et al., arXiv 2410.17897)."""

from resformer_kernels._select import explain
from resformer_kernels.attention.api import (
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.mix.api import mix_value_embedding, mix_values
from resformer_kernels.reservoir.api import reservoir_scan
from resformer_kernels.reservoir.call import RingWeight

__version__ = "0.1.0"

__all__ = [
    "RingWeight",
    "explain",
    "mix_value_embedding",
    "mix_values",
    "reservoir_scan",
    "value_residual_attention",
    "value_residual_attention_varlen",
]
