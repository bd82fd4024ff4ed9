"""Layers whose values vLLM keeps once, and coefficients of a rank's own heads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from resformer_kernels.integrations.transformers.config import build_value_mix
from resformer_kernels.integrations.vllm.backend import ResFormerBackend, Step, step_of
from resformer_kernels.nn import ValueMix


class ValuePages(AttentionLayerBase):
    """The pages of the one V of an SVFormer: to vLLM, one more layer of its cache.

    Args:
        prefix: a name of its own, which holds the number of one layer.
    """

    def __init__(self, prefix: str) -> None:
        self.layer_name = prefix
        self.kv_cache = torch.empty(0)
        self.readers: list[SharedValueAttention] = []
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are called {prefix}")
        layers[prefix] = self

    @property
    def num_heads(self) -> int:
        """Hq of the layers that read the values, which vLLM's builders ask for."""
        return int(self.readers[0].num_heads)

    def check_table(self, step: Step) -> None:
        """Raise RuntimeError unless `step`, of a layer's keys, is that of the values too."""
        if step_of(self.layer_name).block_table is not step.block_table:
            raise RuntimeError("vLLM put keys and values into groups with tables of their own")

    def get_attn_backend(self) -> type[ResFormerBackend]:
        """The backend of the layers that read the values."""
        found: type[ResFormerBackend] = self.readers[0].get_attn_backend()
        return found

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """Those of the keys of the layer that sees furthest: V must be there as long as they."""
        furthest = max(self.readers, key=lambda layer: layer.sliding_window or math.inf)
        return furthest.get_kv_cache_spec(vllm_config)


def check_one_window(pages: list[ValuePages]) -> None:
    """Raise ValueError where a model's layers have different windows.

    vLLM then makes groups with a table of pages each, and V may lie in another one than keys.
    """
    windows = {reader.sliding_window for values in pages for reader in values.readers}
    if len(windows) > 1:
        raise ValueError(
            "an SVFormer's layers must all have the same window, because its values are read by one "
            f"table of pages together with keys; got windows of {windows} tokens (None: full "
            "attention). Convert a model with layers of one kind, or serve a ResFormer"
        )


class SharedValueAttention(Attention):
    """vLLM's attention with pages for keys alone; its values are those of `values`.

    Args:
        values: the pages of V.
        owns_values: whether this layer appends V to them.

    The others are vLLM's. ValueError where the cache has another dtype than the model.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        *,
        values: ValuePages,
        owns_values: bool,
        **options: Any,
    ) -> None:
        options.setdefault("attn_backend", ResFormerBackend)
        super().__init__(num_heads, head_size, scale, **options)
        if self.kv_cache_torch_dtype != self.dtype:
            raise ValueError(
                f"an SVFormer's cache must have the model's dtype, {self.dtype}, got "
                f"kv_cache_dtype {self.kv_cache_dtype!r}: use kv_cache_dtype='auto'"
            )
        values.readers.append(self)
        self.impl.values, self.impl.owns_values = values, owns_values

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """vLLM's, without the half of each page that would hold values."""
        return replace(super().get_kv_cache_spec(vllm_config), head_size_v=0)


def heads_of_rank(count: int) -> slice:
    """The KV heads, of `count` in all, that this rank of tensor parallelism has."""
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    held = max(1, count // ranks)
    first = rank * count // ranks
    return slice(first, first + held)


def value_mix_of_rank(config: Any, layer: int) -> ValueMix:
    """The mix of layer `layer` for this rank's heads, as the checkpoint's loader finds it."""
    mix = build_value_mix(config, layer)
    heads = heads_of_rank(config.num_key_value_heads)
    for name, whole in list(mix.named_parameters()):
        # A coefficient a KV head is (Hkv, 1); all others are the same on every rank.
        rows = heads if whole.dim() == 2 else slice(None)
        part = nn.Parameter(whole.detach()[rows].clone(), requires_grad=False)
        part.weight_loader = _Rows(rows, whole.shape)  # type: ignore[attr-defined]
        setattr(mix, name, part)
    return mix


class _Rows:
    """Loads a rank's rows of a coefficient, whatever shape of one element a checkpoint has."""

    def __init__(self, rows: slice, shape: torch.Size) -> None:
        self.rows, self.shape = rows, shape

    def __call__(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        parameter.data.copy_(loaded.reshape(self.shape)[self.rows])

