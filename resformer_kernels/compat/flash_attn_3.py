"""FlashAttention 3's functions over mixed values.

Signatures and meaning are those of its `flash_attn_interface` (Shah et al., arXiv 2407.08608; the
package `flash_attn_3`, and `fa3-fwd`), on every device and dtype that `value_residual_attention`
serves, with the added keywords `v_first`, `lambda_v`, `lambda_first`, `exclusive`, `exclusive_eps`,
`out_gate` and `backend`. Differences:

- `qv`, `q_descale`, `k_descale`, `v_descale` and an `attention_chunk` other than 0 raise
  NotImplementedError.
- `pack_gqa`, `sm_margin`, `scheduler_metadata`, and `num_splits` without a cache, say how its
  kernels run, not what they compute: they are ignored. `deterministic` changes nothing either.
- softmax_lse is differentiable, and -inf for a query that attends to no key.
- The head_dim of q and k can differ from v's, and be of any size; float32 and float64 are served.
- An error of a wrong shape or dtype is a RuntimeError, as FlashAttention's, and a ValueError or
  TypeError too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_flag, integer
from resformer_kernels._core.select import explainable
from resformer_kernels.compat import _cached, _flash
from resformer_kernels.compat._arguments import refuse
from resformer_kernels.compat._cached import MIXED, Cache, Packed, Run
from resformer_kernels.compat._errors import runtime_errors
from resformer_kernels.compat._flash import Added, Lengths, Scores, check_stacked, unpack
from resformer_kernels.compat._rotary import Rotary

__all__ = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]


def _refuse(qv: Any, descales: tuple[Any, Any, Any], attention_chunk: Any) -> None:
    """NotImplementedError for what the kernels do not compute."""
    refuse("qv", qv, "the kernels have no second product of queries")
    for name, descale in zip("qkv", descales, strict=True):
        refuse(f"{name}_descale", descale, "the kernels take no float8 queries, keys and values")
    if integer("attention_chunk", attention_chunk, 0) != 0:
        raise NotImplementedError(
            f"attention_chunk must be 0, got {attention_chunk}: the kernels have no chunked mask; "
            "window_size is the sliding one"
        )


@runtime_errors()
@explainable
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    v_first: Tensor | None = None,
    lambda_v: float | Tensor = 0.5,
    lambda_first: float | Tensor = 0.5,
    exclusive: float | Tensor | None = None,
    exclusive_eps: float | None = None,
    out_gate: Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """FlashAttention 3's function over lambda_v * v + lambda_first * v_first (arXiv 2410.17897).

    Args:
        q: (B, Tq, Hq, Dk).
        k: (B, Tk, Hkv, Dk), Hq a multiple of Hkv.
        v: (B, Tk, Hkv, Dv), or None to attend over v_first alone.
        softmax_scale: multiplies q.k. None: 1 / sqrt(Dk).
        causal: query i sees keys up to i + Tk - Tq (bottom-right alignment).
        qv, q_descale, k_descale, v_descale: must be None.
        window_size: (left, right), inclusive: query i, at position p = i + Tk - Tq, sees keys
            p - left to p + right. -1 is unbounded.
        attention_chunk: must be 0.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        num_splits, pack_gqa, sm_margin: ignored.
        deterministic: True or False; results are bitwise reproducible either way.
        return_attn_probs: also return softmax_lse.
        v_first: (B, Tk, Hkv, Dv), the first layer's values, or None for plain attention.
        lambda_v: multiplies v. A float, or a tensor that broadcasts to v's shape; the forms are
            those of `value_residual_attention`.
        lambda_first: multiplies v_first; the same forms.
        exclusive, exclusive_eps, out_gate: exclusive self-attention and a gate of out, fused, as in
            `value_residual_attention`. Tensors broadcast to (B, Tq, Hq, 1) and (B, Tq, Hq, Dv).
        backend: as in `value_residual_attention`. A name never falls back.

    Returns:
        out (B, Tq, Hq, Dv), or (out, softmax_lse) with softmax_lse (B, Hq, Tq) float32, the natural
        log of the softmax denominator. A query that attends to no key gives zeros.

    Raises:
        NotImplementedError: what must be None or 0 is not. Otherwise as
            `value_residual_attention`.
    """
    del num_splits, pack_gqa, sm_margin
    _refuse(qv, (q_descale, k_descale, v_descale), attention_chunk)
    check_flag("deterministic", deterministic)
    check_flag("return_attn_probs", return_attn_probs)
    added = Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate)
    scores = Scores(softmax_scale, causal, window_size, softcap)
    return _flash.attend((q, k, v), added, scores, return_attn_probs, backend)


@runtime_errors()
@explainable
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    v_first: Tensor | None = None,
    lambda_v: float | Tensor = 0.5,
    lambda_first: float | Tensor = 0.5,
    exclusive: float | Tensor | None = None,
    exclusive_eps: float | None = None,
    out_gate: Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """`flash_attn_func` on q, k and v in one tensor, read in place.

    The other arguments, the result and the errors are those of `flash_attn_func`; v_first is
    (B, T, Hkv, D).

    Args:
        qkv: (B, T, 3, H, D), or (B, T, Hq + 2 * Hkv, D) with `num_heads_q`: q's heads, then k's,
            then v's.
        num_heads_q: Hq, where qkv has four axes.
    """
    if isinstance(qkv, Tensor) and qkv.dim() == 4:
        axes = "(B, T, num_heads_q + 2 * kv_heads, head_dim)"
        check_stacked("qkv", qkv, 4, axes)
        heads = integer("num_heads_q", num_heads_q, 1)
        kv_heads, odd = divmod(qkv.shape[2] - heads, 2)
        if kv_heads < 1 or odd:
            raise ValueError(
                f"qkv must be {axes}, num_heads_q = {heads}, got shape {tuple(qkv.shape)}"
            )
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    else:
        q, k, v = unpack("qkv", qkv, 3, 5)
    del sm_margin
    _refuse(None, (q_descale, k_descale, v_descale), attention_chunk)
    check_flag("deterministic", deterministic)
    check_flag("return_attn_probs", return_attn_probs)
    added = Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate)
    scores = Scores(softmax_scale, causal, window_size, softcap)
    return _flash.attend((q, k, v), added, scores, return_attn_probs, backend)


@runtime_errors()
@explainable
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    v_first: Tensor | None = None,
    lambda_v: float | Tensor = 0.5,
    lambda_first: float | Tensor = 0.5,
    exclusive: float | Tensor | None = None,
    exclusive_eps: float | None = None,
    out_gate: Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """`flash_attn_func` on sequences packed along the first axis, without a batch axis.

    Arguments not listed are those of `flash_attn_func`.

    Args:
        q: (total_q, Hq, Dk).
        k: (total_k, Hkv, Dk).
        v: (total_k, Hkv, Dv), or None to attend over v_first alone.
        cu_seqlens_q: (batch + 1,) int32: sequence b holds rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] of q.
        cu_seqlens_k: the same for k.
        max_seqlen_q: an upper bound of the query lengths, in tokens.
        max_seqlen_k: an upper bound of the key lengths, in tokens.
        seqused_q: (batch,) int32, at most the query lengths: only the first seqused_q[b] queries of
            sequence b are there. The other rows of out are zeros, their softmax_lse -inf. None: all
            are there.
        seqused_k: the same for the keys.
        v_first: (total_k, Hkv, Dv) or None.
        exclusive, out_gate: tensors broadcast to (total_q, Hq, 1) and (total_q, Hq, Dv).

    Returns:
        out (total_q, Hq, Dv), or (out, softmax_lse (Hq, total_q)).

    Raises:
        As `flash_attn_func` and `value_residual_attention_varlen`.
    """
    del num_splits, pack_gqa, sm_margin
    _refuse(qv, (q_descale, k_descale, v_descale), attention_chunk)
    check_flag("deterministic", deterministic)
    check_flag("return_attn_probs", return_attn_probs)
    added = Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate)
    scores = Scores(softmax_scale, causal, window_size, softcap)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _flash.attend(
        (q, k, v), added, scores, return_attn_probs, backend, lengths, (seqused_q, seqused_k)
    )


@runtime_errors(block_table="page_table", **MIXED)
@explainable
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    v_first: Tensor | None = None,
    lambda_v: float | Tensor = 0.5,
    lambda_first: float | Tensor = 0.5,
    exclusive: float | Tensor | None = None,
    exclusive_eps: float | None = None,
    out_gate: Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """FlashAttention 3's function; with v_first, V' = lambda_v * v + lambda_first * v_first is
    mixed once and appended (Zhou et al., arXiv 2410.17897).

    Arguments not listed are those of `compat.flash_attn.flash_attn_with_kvcache`, where page_table
    is called block_table.

    Args:
        q: (B, Tq, Hq, Dk), or with cu_seqlens_q (total_q, Hq, Dk).
        k: (B, Tnew, Hkv, Dk), or with cu_seqlens_k_new (total_new, Hkv, Dk), appended at
            cache_seqlens, or None.
        v: likewise, with Dv. So v_first.
        qv, q_descale, k_descale, v_descale: must be None.
        page_table: (B, pages a sequence) int32.
        cu_seqlens_q: (B + 1,) int32: the queries of sequence b are rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] of q.
        cu_seqlens_k_new: the same for the rows of k, v and v_first.
        max_seqlen_q: an upper bound of the query lengths, in tokens; needed with cu_seqlens_q.
        rotary_seqlens: (B,) int32: the position of each sequence's first new token. None:
            cache_seqlens.
        attention_chunk: must be 0.
        scheduler_metadata, pack_gqa, sm_margin: ignored.
        return_softmax_lse: also return softmax_lse.
        exclusive, out_gate: with cu_seqlens_q tensors broadcast to (total_q, Hq, 1) and
            (total_q, Hq, Dv).

    Returns:
        out (B, Tq, Hq, Dv) or (total_q, Hq, Dv); or (out, softmax_lse, out_accum,
        softmax_lse_accum) with softmax_lse (B, Hq, Tq) or (Hq, total_q), float32, and two empty
        tensors, where FlashAttention 3 leaves the parts of split keys.

    Raises:
        NotImplementedError: what must be None or 0 is not. Otherwise as `attention_with_kvcache`.
    """
    del scheduler_metadata, pack_gqa, sm_margin
    _refuse(qv, (q_descale, k_descale, v_descale), attention_chunk)
    result = _cached.attend(
        q,
        (k, v),
        Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, page_table),
        Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate),
        Scores(softmax_scale, causal, window_size, softcap),
        Rotary(rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens),
        Packed(cu_seqlens_q, max_seqlen_q if cu_seqlens_q is not None else None, cu_seqlens_k_new),
        Run(num_splits, return_softmax_lse, backend),
    )
    if not return_softmax_lse:
        return result
    out, lse = result
    parts = out.new_empty((0,), dtype=torch.float32)
    return out, lse, parts, parts.clone()
