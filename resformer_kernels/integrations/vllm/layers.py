"""Attention over values that vLLM keeps once, and the coefficients of a rank's own heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention

from resformer_kernels.integrations.transformers.config import build_value_mix
from resformer_kernels.integrations.vllm.backend import ResFormerBackend
from resformer_kernels.integrations.vllm.pages import ValuePages
from resformer_kernels.nn import ValueMix


class SharedValueAttention(Attention):
    """vLLM's attention with pages for keys alone; its values are those of `values`.

    Args:
        values: the pages of V.
        owns_values: whether this layer appends V to them.

    The others are vLLM's. ValueError where the cache has another dtype than the model.
    """

    pages_backend: ClassVar[Any] = ResFormerBackend
    """The backend that reads the pages."""

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
        super().__init__(num_heads, head_size, scale, attn_backend=self.pages_backend, **options)
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
