"""The public function: append to a cache of keys and values, then attend over it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.checks import check_tensor
from resformer_kernels._core.op import refuse_vmap
from resformer_kernels._core.select import explainable, explaining, serve
from resformer_kernels.kvcache import checks, native, packed, reference, triton
from resformer_kernels.kvcache.record import ATTEND

BACKENDS = (native, triton, reference)

_ROWS = (4, "(batch, time, heads, head_dim)")
_PACKED = (3, "(total_q, heads, head_dim)")


@explainable
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
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
    num_splits: int = 0,
    return_lse: bool = False,
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
        cache_seqlens: (B,) int32, or one int for all: tokens in the cache before the append.
        block_table: (B, max_pages) int32: page block_table[b, i] holds tokens i * page_size and
            on of sequence b. Entries past a sequence's end are never read.
        cu_seqlens_q: (B + 1,) int32: the queries of sequence b are rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] of q. They are attended as a batch of max_seqlen_q queries a
            sequence, in memory and in work.
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
        num_splits: splits of each sequence's keys (split-KV), attended separately and merged by
            their LSE; 0 chooses by length. The result differs by rounding alone.
        return_lse: also return the natural log of the softmax denominator, sink included,
            (B, Hq, Tq), or (Hq, total_q), float32 (float64 for float64 inputs).
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
    queries = None
    check_tensor("q", q, *(_ROWS if cu_seqlens_q is None else _PACKED))
    refuse_vmap(ATTEND, (q,))
    if cu_seqlens_q is not None:
        queries = packed.queries(q, cu_seqlens_q, max_seqlen_q)
        q = queries.batch
    cache: dict[str, Any] = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    tokens = None
    if cu_seqlens_k_new is not None:
        tokens = packed.new_tokens(k, v, cu_seqlens_k_new, q.shape[0])
        lengths = checks.check_lengths(cache_seqlens, q)
        k, v, cache_seqlens = None, None, lengths + tokens.packed.lengths
    call = checks.check_call(
        q,
        **cache,
        k=k,
        v=v,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        key_mask=key_mask,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        num_splits=num_splits,
        return_lse=return_lse,
    )
    if tokens is not None:
        append = checks.check_call(**tokens.append(q, lengths, block_table), **cache)
        if not explaining():
            serve(ATTEND, backend, BACKENDS, append)
    out, lse = serve(ATTEND, backend, BACKENDS, call)
    if queries is not None:
        out, lse = queries.unpack(out, lse)
    return (out, lse) if return_lse else out
