"""`flash_attn_func` and `flash_attn_varlen_func`: q, k and v apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.checks import check_flag
from resformer_kernels._core.select import Request, explained_by, prepare
from resformer_kernels.attention.api import (
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.attention.record import check_scale, check_window
from resformer_kernels.compat._refused import refuse_alibi, refuse_dropout

_OURS = ("v_first", "lambda_v", "lambda_first", "backend")


def _options(
    q: Any,
    dropout_p: Any = 0.0,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    deterministic: Any = False,
    return_attn_probs: Any = False,
    block_table: Any = None,
) -> dict[str, Any]:
    """The options of `value_residual_attention` for those of FlashAttention, in their order."""
    refuse_dropout(dropout_p)
    refuse_alibi(
        alibi_slopes, "value_residual_attention takes the same bias written out, as attn_bias"
    )
    if block_table is not None:
        raise NotImplementedError(
            "block_table must be None: keys and values are not read by page; "
            "flash_attn_with_kvcache reads them so"
        )
    check_flag("deterministic", deterministic)
    check_flag("return_attn_probs", return_attn_probs)
    if isinstance(q, Tensor) and q.dim() > 0 and q.shape[-1] > 0:
        softmax_scale = check_scale(softmax_scale, q.shape[-1], "softmax_scale")
    return {
        "scale": softmax_scale,
        "window": check_window(window_size, causal, "window_size"),
        "softcap": softcap,
        "return_lse": return_attn_probs,
    }


def _finish(result: Any, return_attn_probs: bool) -> Any:
    if not return_attn_probs:
        return result
    out, lse = result
    return out, lse, out.new_empty((0,))


def prepare_fixed(q: Any, k: Any, v: Any, *tail: Any, **named: Any) -> Request:
    """What `flash_attn_func` asks for; its arguments. Nothing is computed."""
    ours = {name: named.pop(name) for name in _OURS if name in named}
    return prepare(value_residual_attention, q, k, v, **_options(q, *tail, **named), **ours)


@explained_by(prepare_fixed)
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
    backend: str = "auto",
) -> Any:
    """FlashAttention 2's function over lambda_v * v + lambda_first * v_first (arXiv 2410.17897).

    Args:
        q: (B, Tq, Hq, Dk).
        k: (B, Tk, Hkv, Dk), Hq a multiple of Hkv.
        v: (B, Tk, Hkv, Dv), or None to attend over v_first alone.
        dropout_p: 0; there is no dropout.
        softmax_scale: multiplies q.k. None: 1 / sqrt(Dk).
        causal: query i sees keys up to i + Tk - Tq (bottom-right alignment).
        window_size: (left, right), inclusive: query i, at key p = i + Tk - Tq, sees p - left to
            p + right. -1 is unbounded.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        alibi_slopes: None; there is no ALiBi.
        deterministic: True or False; results are the same bits from run to run either way.
        return_attn_probs: also return softmax_lse, (B, Hq, Tq) float32, the natural log of the
            softmax denominator, and S_dmask, without elements.
        v_first: (B, Tk, Hkv, Dv), the first layer's values, or None for plain attention.
        lambda_v: multiplies v. A float, or a tensor that broadcasts to v's shape; the forms are
            those of `value_residual_attention`.
        lambda_first: multiplies v_first; the same forms.
        backend: "auto", "native" or "reference". A name never falls back.

    Returns:
        out (B, Tq, Hq, Dv), or (out, softmax_lse, S_dmask). A query that may attend to nothing
        gives zeros.

    Raises:
        NotImplementedError: dropout_p above 0, or alibi_slopes. Otherwise as
            `value_residual_attention`.
    """
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    options = _options(q, *tail, return_attn_probs)
    result = value_residual_attention(
        q, k, v, v_first, lambda_v, lambda_first, backend=backend, **options
    )
    return _finish(result, return_attn_probs)


def prepare_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    *tail: Any,
    **named: Any,
) -> Request:
    """What `flash_attn_varlen_func` asks for; its arguments. Nothing is computed."""
    ours = {name: named.pop(name) for name in _OURS if name in named}
    return prepare(
        value_residual_attention_varlen,
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        **_options(q, *tail, **named),
        **ours,
    )


@explained_by(prepare_varlen)
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
    backend: str = "auto",
) -> Any:
    """`flash_attn_func` on sequences packed one after the other, without a batch axis.

    Arguments that are not listed are those of `flash_attn_func`.

    Args:
        q: (total_q, Hq, Dk).
        k: (total_k, Hkv, Dk).
        v: (total_k, Hkv, Dv), or None to attend over v_first alone.
        cu_seqlens_q: (batch + 1,) int32: sequence b holds rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] of q.
        cu_seqlens_k: the same for k.
        max_seqlen_q: an upper bound of the query lengths, in tokens.
        max_seqlen_k: an upper bound of the key lengths, in tokens.
        block_table: None; keys and values are not read by page.
        v_first: (total_k, Hkv, Dv) or None.

    Returns:
        out (total_q, Hq, Dv), or (out, softmax_lse (Hq, total_q), S_dmask without elements).

    Raises:
        NotImplementedError: dropout_p above 0, alibi_slopes or block_table. Otherwise as
            `value_residual_attention_varlen`.
    """
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    options = _options(q, *tail, return_attn_probs, block_table)
    result = value_residual_attention_varlen(
        q,
        k,
        v,
        v_first,
        lambda_v,
        lambda_first,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        backend=backend,
        **options,
    )
    return _finish(result, return_attn_probs)
