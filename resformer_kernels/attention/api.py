"""The public attention functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._core.select import Backend, explainable, serve
from resformer_kernels.attention import flash_attn, native, reference, sdpa, triton
from resformer_kernels.attention.record import FIXED, PACKED, AttentionCall, check_call

BACKENDS: tuple[Backend, ...] = (native, triton, flash_attn, sdpa, reference)
_FLASH_ATTENTION_FIRST: tuple[Backend, ...] = (native, flash_attn, triton, sdpa, reference)
_SDPA_FIRST: tuple[Backend, ...] = (sdpa, native, triton, flash_attn, reference)


def _by_preference(backend: str, call: AttentionCall) -> tuple[Backend, ...]:
    if backend == "auto" and flash_attn.preferred(call, MACHINE):
        return _FLASH_ATTENTION_FIRST
    if backend == "auto" and sdpa.preferred(call, MACHINE):
        return _SDPA_FIRST
    return BACKENDS


def _asked_for(
    call: AttentionCall, results: tuple[Tensor, Tensor | None, Tensor | None]
) -> Tensor | tuple[Tensor | None, ...]:
    out, lse, mixed = results
    if not (call.return_lse or call.return_mixed_value):
        return out
    return (out, *((lse,) * call.return_lse), *((mixed,) * call.return_mixed_value))


@explainable
def value_residual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    v_first: Tensor | None = None,
    lambda_v: float | Tensor = 0.5,
    lambda_first: float | Tensor = 0.5,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attn_bias: Tensor | None = None,
    exclusive: float | Tensor | None = None,
    exclusive_eps: float | None = None,
    out_gate: Tensor | None = None,
    return_lse: bool = False,
    return_mixed_value: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention over V' = lambda_v * v + lambda_first * v_first (Zhou et al., arXiv 2410.17897).

    ResFormer mixes the values of the first layer into those of this one; SVFormer attends over
    the first layer's alone (`v=None`); `v_first=None` is plain attention. The mix is fused: V'
    is computed in float32, rounded once to v's dtype, and never saved for backward.

    For each query, in this order: `scale * q.k`, then `softcap * tanh(. / softcap)`, then the
    additive bias, then the masks; the softmax runs over what is left and the sink. What follows the
    softmax is fused too: with y its output and v' the row of V' at the query's own position
    p = i + Tk - Tq, of the query's KV head (exclusive self-attention, XSA, arXiv 2603.09078),

        out = out_gate * (y - exclusive * (y.v') / max(|v'|, exclusive_eps)^2 * v').

    Args:
        q: (B, Tq, Hq, Dk); float32, bfloat16, float16 or float64 (float64: reference only).
        k: (B, Tk, Hkv, Dk), Hq a multiple of Hkv; query head h reads KV head h // (Hq / Hkv).
        v: (B, Tk, Hkv, Dv), this layer's values, or None to attend over v_first alone.
        v_first: (B, Tk, Hkv, Dv), the first layer's values, or None.
        lambda_v: multiplies v. A float, or a tensor, float32 or v's dtype, that broadcasts to
            v's shape by PyTorch's rules without enlarging it: (), (Hkv, 1), (Hkv, Dv),
            (B, Tk, 1, 1), (B, Tk, Hkv, 1), (B, Tk, Hkv, Dv). Any real value.
        lambda_first: multiplies v_first; the same forms. With v or v_first absent floats are
            ignored and a tensor is an error.
        causal: query i sees keys up to i + Tk - Tq (bottom-right alignment).
        window: (left, right), inclusive: query i, at key p = i + Tk - Tq, sees p - left to
            p + right. -1 is unbounded. `causal` makes right 0.
        scale: multiplies q.k; any finite number. None: 1 / sqrt(Dk).
        softcap: positive, or 0 for none.
        sinks: (Hq,) raw logits, float32 or q's dtype: each adds exp(sink) to its head's softmax
            denominator. Not scaled, capped or biased.
        attn_bias: broadcastable to (B, Hq, Tq, Tk): additive, float32 or q's dtype, or a bool
            mask (True = attend). It intersects with causal and window.
        exclusive: how much of the part along v' is taken out: 1.0 takes all of it, as the paper
            does, None or 0 nothing. A float, or a tensor, float32 or q's dtype, that broadcasts to
            (B, Tq, Hq, 1) without enlarging it: (), (Hq, 1), (B, Tq, 1, 1), (B, Tq, Hq, 1). A tanh
            or the like is the caller's. A mask that hides p changes nothing here, and where p holds
            no key (p < 0) nothing is taken out.
        exclusive_eps: bounds the norm of v' from below; from 1e-18 to 1e18. None: 1e-6.
        out_gate: None, or a tensor, float32 or q's dtype, that broadcasts to (B, Tq, Hq, Dv):
            (Hq, 1), (B, Tq, Hq, 1), (B, Tq, Hq, Dv). Applied last; a sigmoid is the caller's.
        return_lse: also return the natural log of the softmax denominator, sink included,
            (B, Hq, Tq), float32 (float64 for float64 inputs). Differentiable.
        return_mixed_value: also return V', (B, Tk, Hkv, Dv) in v's dtype. Differentiable.
        backend: "auto", "native", "triton", "flash_attn", "sdpa" or "reference". A name never
            falls back.

    Returns:
        out (B, Tq, Hq, Dv) in q's dtype; or a tuple of out, then the LSE and the mixed value,
        each if asked for. A query that may attend to nothing gives zeros and an LSE of -inf
        (with a sink: the sink), and no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the
            message names it. RuntimeError: the named backend cannot serve the call, the call is
            under vmap, or its gradient is differentiated.

    Under autocast q, k, v and v_first are cast to its dtype; coefficients, sinks and bias are not.
    Numbers may be Python's, numpy's or tensors of no axes. Under torch.compile the last two break
    the graph, as their values are data there.
    """
    call = check_call(
        q,
        k,
        v,
        v_first,
        lambda_v,
        lambda_first,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        attn_bias=attn_bias,
        exclusive=exclusive,
        exclusive_eps=exclusive_eps,
        out_gate=out_gate,
        return_lse=return_lse,
        return_mixed_value=return_mixed_value,
    )
    backends = _by_preference(backend, call)
    return _asked_for(call, serve(FIXED, backend, backends, call))


@explainable
def value_residual_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    v_first: Tensor | None = None,
    lambda_v: float | Tensor = 0.5,
    lambda_first: float | Tensor = 0.5,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attn_bias: Tensor | None = None,
    exclusive: float | Tensor | None = None,
    exclusive_eps: float | None = None,
    out_gate: Tensor | None = None,
    return_lse: bool = False,
    return_mixed_value: bool = False,
    backend: str = "auto",
) -> Any:
    """`value_residual_attention` on sequences packed one after the other, without a batch axis.

    Sequence b holds rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q, and likewise for k and the
    values; each is attended on its own, with its own bottom-right alignment. Arguments that are
    not listed are those of `value_residual_attention`.

    Args:
        q: (total_q, Hq, Dk).
        k: (total_k, Hkv, Dk).
        v: (total_k, Hkv, Dv) or None.
        v_first: (total_k, Hkv, Dv) or None.
        lambda_v: a float, or a tensor that broadcasts to (total_k, Hkv, Dv).
        lambda_first: the same.
        cu_seqlens_q: (batch + 1,) int32 on q's device, contiguous or not: starts at 0, never
            decreases, ends within total_q.
        cu_seqlens_k: the same for k; as many sequences.
        max_seqlen_q: an upper bound of the query lengths, in tokens.
        max_seqlen_k: an upper bound of the key lengths, in tokens.
        attn_bias: broadcastable to (batch, Hq, max_seqlen_q, max_seqlen_k), indexed by the
            position within the sequence.
        exclusive: a float, or a tensor that broadcasts to (total_q, Hq, 1).
        out_gate: None, or a tensor that broadcasts to (total_q, Hq, Dv).
        return_lse: the LSE is (Hq, total_q).
        return_mixed_value: V' is (total_k, Hkv, Dv).

    Returns:
        out (total_q, Hq, Dv), or a tuple as `value_residual_attention`. Rows after the last
        sequence are never read; they come back as zeros (LSE: -inf), with zero gradients.

    Raises:
        As `value_residual_attention`. The contents of cu_seqlens are checked on a CPU, and on a
        GPU under RESFORMER_CHECK=1.
    """
    call = check_call(
        q,
        k,
        v,
        v_first,
        lambda_v,
        lambda_first,
        packing=(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        attn_bias=attn_bias,
        exclusive=exclusive,
        exclusive_eps=exclusive_eps,
        out_gate=out_gate,
        return_lse=return_lse,
        return_mixed_value=return_mixed_value,
    )
    backends = _by_preference(backend, call)
    return _asked_for(call, serve(PACKED, backend, backends, call))
