"""An SVFormer's pages read by vLLM's own CPU kernel, which takes K and V as separate tensors.

A contestant of `serving.py`: what sharing V gains with the kernel that vLLM has.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl


class StockImplementation(CPUAttentionBackendImpl):
    """vLLM's, with the keys of the layer and the values of `values`."""

    values: Any = None
    owns_values = False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As vLLM's. Each layer writes V again, to the same place: its op appends no K alone."""
        del output_scale, output_block_scale
        step = attn_metadata
        if step is None:
            return output
        rows = slice(step.num_actual_tokens)
        v_cache = self.values.kv_cache
        scales = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto"}
        ops.cpu_attn_reshape_and_cache(
            key[rows], value[rows], kv_cache, v_cache, step.slot_mapping[rows], layer.isa, **scales
        )
        ops.cpu_attention_with_kv_cache(
            query=query[rows],
            key_cache=kv_cache,
            value_cache=v_cache,
            output=output[rows],
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            scale=self.scale,
            causal=step.causal,
            alibi_slopes=None,
            sliding_window=self.sliding_window,
            block_table=step.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=step.scheduler_metadata,
            s_aux=None,
            dynamic_causal=None,
            **scales,
        )
        return output


class StockBackend(CPUAttentionBackend):
    """vLLM's backend of CPUs, that attends with `StockImplementation`."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM's registry."""
        return "RESFORMER_STOCK"

    @staticmethod
    def get_impl_cls() -> type[StockImplementation]:
        """The class of a layer's attention."""
        return StockImplementation
