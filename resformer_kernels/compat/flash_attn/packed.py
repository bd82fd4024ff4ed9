"""The functions that take k and v, or q, k and v, stacked in one tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.select import explainable
from resformer_kernels.compat._errors import runtime_errors
from resformer_kernels.compat._flash import Added, Lengths, unpack
from resformer_kernels.compat.flash_attn.separate import attend


@runtime_errors()
@explainable
def flash_attn_qkvpacked_func(
    qkv: Tensor,
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
    """`flash_attn_func` on qkv (B, T, 3, H, D): q, k and v with equal heads, read in place.

    The other arguments, the result and the errors are those of `flash_attn_func`; v_first is
    (B, T, H, D).
    """
    q, k, v = unpack("qkv", qkv, 3, 5)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    added = Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate)
    return attend((q, k, v), added, options, return_attn_probs, backend)


@runtime_errors()
@explainable
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
    """`flash_attn_func` on q (B, Tq, Hq, D) and kv (B, Tk, 2, Hkv, D), read in place.

    The other arguments, the result and the errors are those of `flash_attn_func`; v_first is
    (B, Tk, Hkv, D).
    """
    k, v = unpack("kv", kv, 2, 5)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    added = Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate)
    return attend((q, k, v), added, options, return_attn_probs, backend)


@runtime_errors(cu_seqlens_q="cu_seqlens", max_seqlen_q="max_seqlen")
@explainable
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
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
    """`flash_attn_varlen_func` on qkv (total_tokens, 3, H, D), read in place.

    cu_seqlens and max_seqlen apply to queries and keys; v_first is (total_tokens, H, D).
    The other arguments, the result and the errors are those of `flash_attn_varlen_func`.
    """
    q, k, v = unpack("qkv", qkv, 3, 4)
    lengths = Lengths(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    added = Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate)
    return attend((q, k, v), added, options, return_attn_probs, backend, lengths)


@runtime_errors()
@explainable
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
    *,
    v_first: Tensor | None = None,
    lambda_v: float | Tensor = 0.5,
    lambda_first: float | Tensor = 0.5,
    exclusive: float | Tensor | None = None,
    exclusive_eps: float | None = None,
    out_gate: Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """`flash_attn_varlen_func` on q (total_q, Hq, D) and kv (total_k, 2, Hkv, D), read in place.

    v_first is (total_k, Hkv, D). The other arguments, the result and the errors are those of
    `flash_attn_varlen_func`.
    """
    k, v = unpack("kv", kv, 2, 4)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    added = Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate)
    return attend((q, k, v), added, options, return_attn_probs, backend, lengths)
