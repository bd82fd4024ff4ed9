"""vLLM's attention backend over pages of keys, and over one set of pages of values.

To vLLM a page has no halves here: the keys of a layer are one layer of its cache, and SVFormer's V
is another (`pages.ValuePages`), each (pages, Hkv, page_size, D).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from resformer_kernels import attention_with_kvcache, plan_kvcache
from resformer_kernels.integrations.vllm import BACKEND
from resformer_kernels.integrations.vllm.pages import ValuePages
from resformer_kernels.kvcache.prepared import KVCachePlan


@dataclass
class Step:
    """What the layers of a group of vLLM's cache share in one step of the engine."""

    tokens: int
    """New tokens of all requests; rows of q after them are padding."""
    offsets: Tensor
    """(requests + 1,) int32: where each request's new tokens begin."""
    longest: int
    """New tokens of the request with most of them, at most."""
    cached: Tensor
    """(requests,) int32: tokens of each request before the step."""
    block_table: Tensor
    """(requests, pages) int32."""
    plans: dict[tuple[tuple[int, int], str], KVCachePlan] = field(default_factory=dict)
    """Calls that the first layer of a kind prepared: by its window and the name of its values."""


class Builder(AttentionMetadataBuilder[Step]):
    """Makes a `Step` of a group, once a step."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        """The group's step. A prefix that requests share is not attended separately."""
        del common_prefix_len, fast_build
        given = common_attn_metadata
        if given.causal is not True:
            raise ValueError(
                f"{BACKEND} serves causal attention alone, got causal {given.causal!r}"
            )
        return Step(
            tokens=given.num_actual_tokens,
            offsets=given.query_start_loc,
            longest=given.max_query_len,
            cached=given.compute_num_computed_tokens(),
            block_table=given.block_table_tensor,
        )


class Implementation(AttentionImpl[Step]):
    """Attention of a layer: its keys are its own, its values those of `values`.

    Args:
        num_heads: Hq of this rank.
        head_size: D of queries, keys and values.
        scale: multiplies q.k.
        num_kv_heads: Hkv of this rank.
        sliding_window: keys that a query sees, its own included; None: all.
        logits_soft_cap: None or 0: no cap.

    Raises:
        ValueError: one of vLLM's other options is asked for.
    """

    values: ValuePages
    """Where the values lie; set by `SharedValueAttention`."""
    owns_values: bool
    """Whether this layer appends the values, which the others read; set by the layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        refuse("ALiBi (alibi_slopes)", alibi_slopes, None)
        refuse("attn_type", str(getattr(attn_type, "value", attn_type)), "decoder")
        refuse("kv_sharing_target_layer_name", kv_sharing_target_layer_name, None)
        refuse("sinks", sinks, None)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size, self.scale = head_size, float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.window = (-1 if sliding_window is None else sliding_window - 1, -1)
        self.softcap = logits_soft_cap or 0.0

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Raise ValueError where the backend was asked for by name, for a model of another kind."""
        del act_dtype
        if not hasattr(self, "values"):
            raise ValueError(f"attention backend {BACKEND} serves an SVFormer's layers alone")

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Append keys (and values, where the layer owns them) to their pages, then attend.

        Args:
            layer: the layer, whose scales of quantised caches are not read.
            query: (tokens, Hq, D), rows after the step's tokens are padding.
            key: (tokens, Hkv, D).
            value: (tokens, Hkv, D), of the new tokens.
            kv_cache: this layer's pages of keys, (pages, Hkv, page_size, D).
            attn_metadata: the step of this layer's group; None where vLLM only measures memory.
            output: (tokens, Hq, D), written in place.
            output_scale: must be None, and so must output_block_scale.
        """
        del layer
        refuse("output_scale", output_scale, None)
        refuse("output_block_scale", output_block_scale, None)
        if attn_metadata is None:
            return output.zero_()
        rows = slice(attn_metadata.tokens)
        new = value[rows] if self.owns_values else None
        self._attend(query[rows], key[rows], new, kv_cache, attn_metadata, output[rows])
        return output

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor | None, keys: Tensor, step: Step, out: Tensor
    ) -> None:
        """One call for all requests of the step, into out (tokens, Hq, D)."""
        caches = keys.transpose(1, 2), self.values.kv_cache.transpose(1, 2)
        kind = self.window, self.values.layer_name
        plan = step.plans.get(kind)
        if plan is None:
            found = step_of(self.values.layer_name).block_table
            plan = step.plans[kind] = plan_kvcache(
                q,
                *caches,
                k,
                # No values need be there to plan for layers that have some.
                k if v is None else v,
                cache_seqlens=step.cached,
                block_table=step.block_table,
                v_block_table=None if found is step.block_table else found,
                cu_seqlens_q=step.offsets,
                max_seqlen_q=step.longest,
                cu_seqlens_k_new=step.offsets,
                window=self.window,
                scale=self.scale,
                softcap=self.softcap,
            )
        attention_with_kvcache(q, *caches, k, v, out=out, plan=plan)


def refuse(name: str, given: Any, served: Any) -> None:
    """Raise ValueError unless an option of vLLM has the one value that is served."""
    if given is not served and given != served:
        raise ValueError(f"attention over shared values takes {name} {served!r}, got {given!r}")


def step_of(layer_name: str) -> Step:
    """The current step of a layer's group."""
    metadata: Any = get_forward_context().attn_metadata
    # A list holds the steps of the drafts of speculative decoding after the model's own.
    found: Step = (metadata[0] if isinstance(metadata, list) else metadata)[layer_name]
    return found


class ResFormerBackend(AttentionBackend):
    """The backend `RESFORMER`: what it takes, and its parts. SVFormer's layers ask for it."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM's registry."""
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[Implementation]:
        """The class of a layer's attention."""
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The class that makes a group's step."""
        return Builder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are served."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Both that keep a page of a layer together: the kernels read any strides."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)
