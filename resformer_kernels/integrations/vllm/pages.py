"""Pages for the one V of an SVFormer in vLLM's cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend


class ValuePages(AttentionLayerBase):
    """The pages of the one V of an SVFormer: to vLLM, one more layer of its cache.

    Args:
        prefix: a name of its own, which holds the number of one layer.
    """

    def __init__(self, prefix: str) -> None:
        self.layer_name = prefix
        self.kv_cache = torch.empty(0)
        self.readers: list[Attention] = []
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are called {prefix}")
        layers[prefix] = self

    @property
    def num_heads(self) -> int:
        """Hq of the layers that read the values, which vLLM's builders ask for."""
        return int(self.readers[0].num_heads)

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend of the layers that read the values."""
        found: type[AttentionBackend] = self.readers[0].get_attn_backend()
        return found

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """Those of the keys of the layer that sees furthest: V must be there as long as they."""
        furthest = max(self.readers, key=lambda layer: layer.sliding_window or math.inf)
        return furthest.get_kv_cache_spec(vllm_config)
