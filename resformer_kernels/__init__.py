"""Kernels for value-residual attention (Zhou et al., arXiv 2410.17897)."""

from resformer_kernels._select import explain
from resformer_kernels.attention.api import (
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.kvcache.cache import SharedValueCache
from resformer_kernels.kvcache.layout import KVLayout
from resformer_kernels.mix.api import mix_value_embedding, mix_values

__version__ = "0.1.0"

__all__ = [
    "KVLayout",
    "SharedValueCache",
    "attention_with_kvcache",
    "explain",
    "mix_value_embedding",
    "mix_values",
    "value_residual_attention",
    "value_residual_attention_varlen",
]
