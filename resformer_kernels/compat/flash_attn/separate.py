"""`flash_attn_func` and `flash_attn_varlen_func`: q, k and v as separate tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.checks import check_flag
from resformer_kernels._core.select import explainable
from resformer_kernels.compat import _cached, _flash
from resformer_kernels.compat._arguments import refuse_alibi, refuse_dropout
from resformer_kernels.compat._errors import runtime_errors
from resformer_kernels.compat._flash import Added, Lengths, Scores


def attend(
    qkv: tuple[Any, Any, Any],
    added: Added,
    options: tuple[Any, ...],
    return_attn_probs: Any,
    backend: str,
    lengths: Lengths | None = None,
    block_table: Any = None,
) -> Any:
    """The call of every function here and in `packed`.

    Args:
        qkv: q, k and v.
        added: the arguments that FlashAttention lacks.
        options: the arguments from dropout_p to deterministic, in FlashAttention's order.
        return_attn_probs, backend: as in `flash_attn_func`.
        lengths: those of packed sequences.
        block_table: as in `flash_attn_varlen_func`.
    """
    dropout_p, scale, causal, window_size, softcap, alibi_slopes, deterministic = options
    refuse_dropout(dropout_p)
    refuse_alibi(
        alibi_slopes, "value_residual_attention takes the same bias written out, as attn_bias"
    )
    check_flag("deterministic", deterministic)
    check_flag("return_attn_probs", return_attn_probs)
    scores = Scores(scale, causal, window_size, softcap)
    if lengths is not None and block_table is not None:
        result = _cached.attend_pages(
            qkv, added, scores, return_attn_probs, backend, lengths, block_table
        )
    else:
        result = _flash.attend(qkv, added, scores, return_attn_probs, backend, lengths)
    if not return_attn_probs:
        return result
    out, lse = result
    return out, lse, out.new_empty((0,))


@runtime_errors()
@explainable
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
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
    """FlashAttention 2's function over lambda_v * v + lambda_first * v_first (arXiv 2410.17897).

    Args:
        q: (B, Tq, Hq, Dk).
        k: (B, Tk, Hkv, Dk), Hq a multiple of Hkv.
        v: (B, Tk, Hkv, Dv), or None to attend over v_first alone.
        dropout_p: must be 0; dropout is not supported.
        softmax_scale: multiplies q.k. None: 1 / sqrt(Dk).
        causal: query i sees keys up to i + Tk - Tq (bottom-right alignment).
        window_size: (left, right), inclusive: query i, at position p = i + Tk - Tq, sees keys
            p - left to p + right. -1 is unbounded.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        alibi_slopes: must be None; ALiBi is not supported.
        deterministic: True or False; results are bitwise reproducible either way.
        return_attn_probs: also return softmax_lse, (B, Hq, Tq) float32, the natural log of the
            softmax denominator, and S_dmask, an empty tensor.
        v_first: (B, Tk, Hkv, Dv), the first layer's values, or None for plain attention.
        lambda_v: multiplies v. A float, or a tensor that broadcasts to v's shape; the forms are
            those of `value_residual_attention`.
        lambda_first: multiplies v_first; the same forms.
        exclusive, exclusive_eps, out_gate: exclusive self-attention and a gate of out, fused, as in
            `value_residual_attention`. Tensors broadcast to (B, Tq, Hq, 1) and (B, Tq, Hq, Dv).
        backend: "auto", "native" or "reference". A name never falls back.

    Returns:
        out (B, Tq, Hq, Dv), or (out, softmax_lse, S_dmask). A query that attends to no key gives
        zeros.

    Raises:
        NotImplementedError: dropout_p above 0, or alibi_slopes. Otherwise as
            `value_residual_attention`.
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    added = Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate)
    return attend((q, k, v), added, options, return_attn_probs, backend)


@runtime_errors(cache_seqlens="cu_seqlens_k", k_cache="k", v_cache="v")
@explainable
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
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
        k: (total_k, Hkv, Dk), or with block_table (pages, page_size, Hkv, Dk), of any page_size.
        v: (total_k, Hkv, Dv), or (pages, page_size, Hkv, Dv), or None to attend over v_first alone.
        cu_seqlens_q: (batch + 1,) int32: sequence b holds rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] of q.
        cu_seqlens_k: the same for k. With block_table its differences are the key lengths.
        max_seqlen_q: an upper bound of the query lengths, in tokens.
        max_seqlen_k: an upper bound of the key lengths, in tokens.
        block_table: (batch, pages a sequence) int32: page block_table[b, i] holds keys
            i * page_size and on of sequence b. Differentiating the result raises.
        v_first: (total_k, Hkv, Dv) or None. With block_table v or v_first is None: pages hold mixed
            values, which `flash_attn_with_kvcache` appends.
        exclusive, out_gate: tensors broadcast to (total_q, Hq, 1) and (total_q, Hq, Dv).

    Returns:
        out (total_q, Hq, Dv), or (out, softmax_lse (Hq, total_q), empty S_dmask).

    Raises:
        NotImplementedError: dropout_p above 0, or alibi_slopes. Otherwise as
            `value_residual_attention_varlen`, or with block_table as `attention_with_kvcache`.
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    added = Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attend((q, k, v), added, options, return_attn_probs, backend, lengths, block_table)
