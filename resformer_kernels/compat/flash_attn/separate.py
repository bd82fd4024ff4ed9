"""`flash_attn_func` and `flash_attn_varlen_func`: q, k and v as separate tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.checks import check_flag
from resformer_kernels._core.select import explainable
from resformer_kernels.attention.api import (
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.attention.record import check_scale, check_window
from resformer_kernels.compat._refused import refuse_alibi, refuse_dropout


def attend(
    qkv: tuple[Any, Any, Any],
    mix: tuple[Any, Any, Any],
    options: tuple[Any, ...],
    return_attn_probs: Any,
    backend: str,
    lengths: tuple[Any, Any, Any, Any] | None = None,
) -> Any:
    """The call of every function here and in `packed`.

    Args:
        qkv: q, k and v.
        mix: v_first, lambda_v and lambda_first.
        options: the arguments from dropout_p to deterministic, in FlashAttention's order.
        return_attn_probs, backend: as in `flash_attn_func`.
        lengths: cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k of packed sequences.
    """
    q, k, v = qkv
    v_first, lambda_v, lambda_first = mix
    dropout_p, scale, causal, window_size, softcap, alibi_slopes, deterministic = options
    refuse_dropout(dropout_p)
    refuse_alibi(
        alibi_slopes, "value_residual_attention takes the same bias written out, as attn_bias"
    )
    check_flag("deterministic", deterministic)
    check_flag("return_attn_probs", return_attn_probs)
    if isinstance(q, Tensor) and q.dim() > 0 and q.shape[-1] > 0:
        scale = check_scale(scale, q.shape[-1], "softmax_scale")
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "v_first": v_first,
        "lambda_v": lambda_v,
        "lambda_first": lambda_first,
        "scale": scale,
        "window": check_window(window_size, causal, "window_size"),
        "softcap": softcap,
        "return_lse": return_attn_probs,
        "backend": backend,
    }
    if lengths is None:
        result = value_residual_attention(**arguments)
    else:
        cu_q, cu_k, max_q, max_k = lengths
        result = value_residual_attention_varlen(
            **arguments,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
        )
    if not return_attn_probs:
        return result
    out, lse = result
    return out, lse, out.new_empty((0,))


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
        backend: "auto", "native" or "reference". A name never falls back.

    Returns:
        out (B, Tq, Hq, Dv), or (out, softmax_lse, S_dmask). A query that attends to no key gives
        zeros.

    Raises:
        NotImplementedError: dropout_p above 0, or alibi_slopes. Otherwise as
            `value_residual_attention`.
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    mix = (v_first, lambda_v, lambda_first)
    return attend((q, k, v), mix, options, return_attn_probs, backend)


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
        block_table: must be None; keys and values are not paged.
        v_first: (total_k, Hkv, Dv) or None.

    Returns:
        out (total_q, Hq, Dv), or (out, softmax_lse (Hq, total_q), empty S_dmask).

    Raises:
        NotImplementedError: dropout_p above 0, alibi_slopes or block_table. Otherwise as
            `value_residual_attention_varlen`.
    """
    if block_table is not None:
        raise NotImplementedError(
            "block_table must be None: keys and values are not paged; flash_attn_with_kvcache "
            "reads paged ones"
        )
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    mix = (v_first, lambda_v, lambda_first)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attend((q, k, v), mix, options, return_attn_probs, backend, lengths)
