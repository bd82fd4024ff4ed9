"""Kernels for value-residual attention (Zhou et al., arXiv 2410.17897)."""

from resformer_kernels._core.select import explain
from resformer_kernels.attention.api import (
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.kvcache.api import attention_with_kvcache, plan_kvcache
from resformer_kernels.kvcache.cache.cache import SharedValueCache
from resformer_kernels.kvcache.cache.layout import KVLayout
from resformer_kernels.mix.api import mix_value_embedding, mix_values
from resformer_kernels.reservoir.api import reservoir_scan
from resformer_kernels.reservoir.record import RingWeight
from resformer_kernels.scan.api import linear_scan

__version__ = "0.1.0"

__all__ = [
    "KVLayout",
    "RingWeight",
    "SharedValueCache",
    "attention_with_kvcache",
    "explain",
    "linear_scan",
    "mix_value_embedding",
    "mix_values",
    "plan_kvcache",
    "reservoir_scan",
    "value_residual_attention",
    "value_residual_attention_varlen",
]
