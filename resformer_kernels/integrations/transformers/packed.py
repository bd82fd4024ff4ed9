"""Attention of packed sequences: over the tokens of a batch, or over the pages of a server."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache

from resformer_kernels._core.checks import describe
from resformer_kernels.attention.api import value_residual_attention_varlen
from resformer_kernels.kvcache.api import attention_with_kvcache, plan_kvcache
from resformer_kernels.kvcache.prepared import KVCachePlan


def attend_packed(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool | None,
    options: dict[str, Any],
    packing: dict[str, Any],
) -> Tensor:
    """Attention of packed sequences, (1, total, Hq, Dv), from q, k and v of that layout.

    Args:
        module: the calling attention module; its `is_causal` is the default.
        options: what `value_residual_attention_varlen` takes as scale, softcap and sinks.
        packing: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` and, where there
            is one, `sliding_window`.

    Raises:
        ValueError: nothing says whether attention is causal.
    """
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise ValueError(
            f"packed sequences need is_causal: {type(module).__name__} has no such attribute, and "
            "the call does not give it"
        )
    reach = _reach(packing)
    packed: Tensor = value_residual_attention_varlen(
        q.squeeze(0),
        k.squeeze(0),
        v.squeeze(0),
        cu_seqlens_q=packing["cu_seq_lens_q"],
        cu_seqlens_k=packing["cu_seq_lens_k"],
        max_seqlen_q=packing["max_length_q"],
        max_seqlen_k=packing["max_length_k"],
        window=(reach, 0 if causal else reach),
        **options,
    )
    return packed.unsqueeze(0)


def _reach(packing: dict[str, Any]) -> int:
    """Keys that a query sees on either side of its own; -1: all."""
    sliding_window: int | None = packing.get("sliding_window")
    return -1 if sliding_window is None else sliding_window - 1


# A compiler would trace the host's work, and guard on the lengths of every step.
@torch.compiler.disable
def attend_in_pages(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
    packing: dict[str, Any],
) -> Tensor:
    """Append to the cache of continuous batching and attend there, (1, total, Hq, D).

    Layers that keep all tokens are read in their pages, by `attention_with_kvcache`. Those that
    keep a ring of the last ones, and prompts without a past, go to `attend_packed`.

    Args:
        module: the calling attention module; `layer_idx` is its layer.
        q: (1, total, Hq, D), the new tokens of all requests; k and v (1, total, Hkv, D).
        options: scale, softcap and sinks.
        packing: the arguments of transformers' model in continuous batching: those of
            `attend_packed`, by kind of layer for keys, and `cache` and `read_index`.

    Raises:
        TypeError: the cache is none of continuous batching.
    """
    cache = packing["cache"]
    if not isinstance(cache, PagedAttentionCache):
        raise TypeError(
            "cache must be the PagedAttentionCache of continuous batching, got "
            f"{describe(cache)}: other caches are past_key_values"
        )
    layer = module.layer_idx
    allocator: Any = cache.layer_to_allocator[layer]
    index = packing["read_index"][allocator.index]
    if not (allocator.supports_block_table and index.numel()):
        heads_first = (x.transpose(1, 2) for x in (k, v))
        k, v = cache.update(*heads_first, layer, packing)
        return attend_packed(
            module, q, k.transpose(1, 2), v.transpose(1, 2), True, options, packing
        )
    q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
    keys, values = allocator.get_cache_for_block_table(layer)
    plan = _plan(allocator, (q, keys, values, k, v), options, packing)
    new = v if allocator.appends_values(layer) else None
    out: Tensor = attention_with_kvcache(q, keys, values, k, new, sinks=options["sinks"], plan=plan)
    return out.unsqueeze(0)


def _plan(
    allocator: Any,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    options: dict[str, Any],
    packing: dict[str, Any],
) -> KVCachePlan:
    """The plan of this step for layers of one scale, cap and window, made by the first of them.

    Its tensors are q, the pages of keys and of values, and the new keys and values.
    """
    index = packing["read_index"][allocator.index]
    # The step's own tensor, kept by the plans, is what tells steps apart.
    if allocator.step is None or allocator.step[0] is not index:
        allocator.step = index, {}
    plans: dict[Any, KVCachePlan] = allocator.step[1]
    kind = options["scale"], options["softcap"], _reach(packing)
    if kind not in plans:
        offsets, ends = packing["cu_seq_lens_q"], packing["cu_seq_lens_k"][allocator.layer_type]
        longest = packing["max_length_k"][allocator.layer_type]
        plans[kind] = plan_kvcache(
            *tensors,
            cache_seqlens=ends.diff() - offsets.diff(),
            block_table=block_table(index, ends, longest, allocator.tokens_per_page),
            cu_seqlens_q=offsets,
            max_seqlen_q=packing["max_length_q"],
            cu_seqlens_k_new=offsets,
            window=(_reach(packing), 0),
            scale=options["scale"],
            softcap=options["softcap"],
        )
    return plans[kind]


def block_table(rows: Tensor, ends: Tensor, longest: int, page_size: int) -> Tensor:
    """The pages of requests, from the rows where their tokens lie.

    Args:
        rows: (total,) integers: row r of a layer's view is token r % page_size of page
            r // page_size.
        ends: (B + 1,) int32: the tokens of request b are ends[b] to ends[b + 1] of rows.
        longest: tokens of the longest request, at least.

    Returns:
        (B, pages) int32. Entries past a request's end are pages of other requests.
    """
    firsts = torch.arange(0, longest, page_size, device=rows.device)
    places = (ends[:-1, None] + firsts).clamp(max=rows.shape[0] - 1)
    return (rows[places] // page_size).int()
