"""The cache of keys and values, and its parts."""

from resformer_kernels.kvcache.cache.cache import SharedValueCache
from resformer_kernels.kvcache.cache.layout import KVLayout

__all__ = ["KVLayout", "SharedValueCache"]
