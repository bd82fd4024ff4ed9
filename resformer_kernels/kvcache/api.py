"""The public functions: append to a cache of keys and values, then attend over it; plan that."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.select import explainable, explaining, select, serve
from resformer_kernels.kvcache import checks, native, reference, triton
from resformer_kernels.kvcache.prepared import KVCachePlan
from resformer_kernels.kvcache.record import ATTEND

BACKENDS = (native, triton, reference)


@explainable
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    v_block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    exclusive: float | Tensor | None = None,
    exclusive_eps: float | None = None,
    out_gate: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    out: Tensor | None = None,
    plan: KVCachePlan | None = None,
    backend: str = "auto",
) -> Any:
    """Append new tokens to a cache of keys and values, in place, then attend over it.

    The meaning is that of FlashAttention's `flash_attn_with_kvcache`, without its rotary part. The
    cache may be contiguous or paged. For SVFormer (Zhou et al., arXiv 2410.17897) every layer is
    given the same `v_cache`; layer 0 appends k and v, the others k alone. For ResFormer the new
    tokens' mixed values V' are what is appended.

    Queries align with the end: query i stands at key length - Tq + i, where length is
    cache_seqlens plus the appended tokens. For each query, in this order: `scale * q.k`, then
    `softcap * tanh(. / softcap)`, then the masks; the softmax runs over what is left and the sink.

    Args:
        q: (B, Tq, Hq, Dk); float32, bfloat16, float16 or float64 (float64: reference only). With
            `cu_seqlens_q` (total_q, Hq, Dk): each sequence has its own number of queries.
        k_cache: (B, T, Hkv, Dk), or with `block_table` (pages, page_size, Hkv, Dk); Hq is a
            multiple of Hkv. q's dtype, or int8, float8_e4m3fn or float8_e5m2 (float8: GPUs and
            reference) with scales. Any strides with a contiguous last axis; never copied.
        v_cache: (B, T, Hkv, Dv) or (pages, page_size, Hkv, Dv), k_cache's dtype.
        k: (B, Tnew, Hkv, Dk), written to positions cache_seqlens[b] to cache_seqlens[b] + Tnew of
            k_cache before attending; None appends no keys.
            With `cu_seqlens_k_new` (total_new, Hkv, Dk).
        v: (B, Tnew, Hkv, Dv), likewise; None where those positions' values are in v_cache already.
        cache_seqlens: (B,) int32, or one int for all: tokens in the cache before the append. Given
            unless `plan` is.
        block_table: (B, max_pages) int32: page block_table[b, i] holds tokens i * page_size and
            on of sequence b. Entries past a sequence's end are never read.
        v_block_table: the same of v_cache, whose number of pages is then its own; None: both
            caches have block_table's pages.
        cu_seqlens_q: (B + 1,) int32: the queries of sequence b are rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] of q. Prompts and decoded tokens go in one call.
        max_seqlen_q: an upper bound of the query lengths, in tokens. Goes with cu_seqlens_q.
        cu_seqlens_k_new: the same for the rows of k and v.
        key_mask: (B, T') or (B, 1, 1, T') bool, True = attend; T' at least the length after the
            append. For left padding. It intersects with causal and window.
        causal: query i sees keys up to its own position.
        window: (left, right), inclusive: a query at position p sees p - left to p + right. -1 is
            unbounded. `causal` makes right 0.
        scale: multiplies q.k; any finite number. None: 1 / sqrt(Dk).
        softcap: positive, or 0 for none.
        sinks: (Hq,) raw logits, float32 or q's dtype: each adds exp(sink) to its head's softmax
            denominator. Not scaled or capped.
        k_scale: float32 (B, T, Hkv) or (pages, page_size, Hkv): a quantised cache's values are
            code * scale. Appended tokens are quantised symmetrically, per token and head.
        v_scale: the same of v_cache.
        exclusive: how much of the part along v', the cached value at the query's own position, is
            taken from the output, as in `value_residual_attention`: a float, or a tensor that
            broadcasts to (B, Tq, Hq, 1), packed (total_q, Hq, 1). Where key_mask hides that
            position nothing is taken out.
        exclusive_eps: bounds the norm of v' from below; None: 1e-6.
        out_gate: None, or a tensor that broadcasts to the result's shape. Applied last.
        num_splits: splits of each sequence's keys (split-KV), attended separately and merged by
            their LSE; 0 chooses by length. The result differs by rounding alone.
        return_lse: also return the natural log of the softmax denominator, sink included,
            (B, Hq, Tq), or (Hq, total_q), float32 (float64 for float64 inputs).
        out: takes the result: its shape, q's dtype, a contiguous last axis, memory that no other
            argument has.
        plan: of `plan_kvcache`, for this call and those of other layers. Then q, the caches, k, v,
            k_scale, v_scale, sinks, exclusive, exclusive_eps, out_gate, return_lse and out are
            given, and nothing else.
        backend: "auto", "native", "triton" or "reference". A name never falls back.

    Returns:
        out (B, Tq, Hq, Dv), or (total_q, Hq, Dv), in q's dtype, or (out, lse). A query that may
        attend to nothing gives zeros and an LSE of -inf (with a sink: the sink). What the cache
        holds past a sequence's end, or where key_mask is False, never matters, NaN included. Rows
        of q after the last sequence are zeros, with an LSE of -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, a full
            cache, a page that does not exist; the message names it, and the cache is as it was.
            The contents of cache_seqlens, cu_seqlens_* and block_table are checked on a CPU, and on
            a GPU under RESFORMER_CHECK=1. RuntimeError: the named backend cannot serve the call,
            the call is under vmap, or an argument requires a gradient: there is none.

    Under autocast q, k and v are cast to the cache's dtype (quantised caches: to autocast's).
    """
    if plan is not None:
        tensors = (cache_seqlens, block_table, v_block_table, cu_seqlens_q, cu_seqlens_k_new)
        others = (key_mask, max_seqlen_q, scale)
        options = (causal, window, softcap, num_splits, backend)
        if options != _DEFAULTS or any(x is not None for x in (*tensors, *others)):
            raise ValueError(
                "plan must be given with q, k_cache, v_cache, k, v, k_scale, v_scale, sinks, "
                "exclusive, exclusive_eps, out_gate, return_lse and out alone: it has the others"
            )
        call = plan.call_of(
            q,
            k_cache,
            v_cache,
            k,
            v,
            scales=(k_scale, v_scale),
            sinks=sinks,
            return_lse=return_lse,
            out=out,
            exclusive=exclusive,
            exclusive_eps=exclusive_eps,
            out_gate=out_gate,
        )
        found = serve(ATTEND, plan.backend, BACKENDS, call) if explaining() else plan.run(call)
    else:
        call = checks.check_call(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=cache_seqlens,
            block_table=block_table,
            v_block_table=v_block_table,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            cu_seqlens_k_new=cu_seqlens_k_new,
            key_mask=key_mask,
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            num_splits=num_splits,
            return_lse=return_lse,
            out=out,
            exclusive=exclusive,
            exclusive_eps=exclusive_eps,
            out_gate=out_gate,
        )
        found = serve(ATTEND, backend, BACKENDS, call)
    result, lse = found
    if call.cu_seqlens_q is not None:
        result, lse = result[0], None if lse is None else lse[0]
    result = result if out is None else out
    return (result, lse) if return_lse else result


_DEFAULTS = (True, (-1, -1), 0.0, 0, "auto")


@explainable
def plan_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    v_block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    backend: str = "auto",
) -> KVCachePlan:
    """Check and plan a call of `attention_with_kvcache` once, for all layers of a step.

    Lengths, block tables, offsets and masks are checked here, and the backend is chosen. A layer
    then calls `attention_with_kvcache(q, k_cache, v_cache, k, v, plan=plan)`, which looks at
    shapes, dtypes and devices alone. Nothing is computed here, and nothing written.

    Args:
        q, k_cache, v_cache, k, v, k_scale, v_scale: those of any layer: what counts is their
            shapes, dtypes and devices, which all layers share. A layer may leave out one of k and
            v, as SVFormer's do, where the plan has new tokens.
        others: as `attention_with_kvcache` takes them. The plan keeps these tensors: what they hold
            must not change before the last call, except on a GPU, within the same bounds, as a
            replayed CUDA graph changes them.

    Raises:
        What `attention_with_kvcache` raises.
    """
    call = checks.check_call(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        v_block_table=v_block_table,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        key_mask=key_mask,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        k_scale=k_scale,
        v_scale=v_scale,
        num_splits=num_splits,
    )
    if explaining():
        serve(ATTEND, backend, BACKENDS, call)
    return KVCachePlan(call, select(ATTEND, backend, BACKENDS, call))
