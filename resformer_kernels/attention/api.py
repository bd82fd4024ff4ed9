"""The public attention functions: their meaning, their checks, and the choice of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import autocast_dtype, check_flag, check_tensor
from resformer_kernels._core.select import Request, explained_by, select
from resformer_kernels.attention import flash_attn, native, reference, triton
from resformer_kernels.attention import op as ops
from resformer_kernels.attention import record as checks
from resformer_kernels.attention.record import AttentionCall

BACKENDS = (native, triton, flash_attn, reference)

_FIXED_Q = "(batch, time, heads, head_dim)"
_FIXED_K = "(batch, time, kv_heads, head_dim)"
_PACKED_Q = "(total_tokens, heads, head_dim)"
_PACKED_K = "(total_tokens, kv_heads, head_dim)"


def _tensors(
    q: Any, k: Any, v: Any, v_first: Any, packed: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check and autocast the four large arguments."""
    rank, axes_q, axes_k = (3, _PACKED_Q, _PACKED_K) if packed else (4, _FIXED_Q, _FIXED_K)
    check_tensor("q", q, rank, axes_q)
    check_tensor("k", k, rank, axes_k)
    for name, tensor in (("v", v), ("v_first", v_first)):
        if tensor is not None:
            check_tensor(name, tensor, rank, f"{axes_k} or None")
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(q):
        raise RuntimeError(ops.VMAP_ERROR)
    q, k, v, v_first = (
        x if x is None else x.to(autocast_dtype(x.device, x.dtype)) for x in (q, k, v, v_first)
    )
    checks.check_values(q, k, v, v_first)
    return q, k, v, v_first


def _prepare(
    q: Any,
    k: Any,
    v: Any,
    v_first: Any = None,
    lambda_v: Any = 0.5,
    lambda_first: Any = 0.5,
    *,
    causal: Any = False,
    window: Any = (-1, -1),
    scale: Any = None,
    softcap: Any = 0.0,
    sinks: Any = None,
    attn_bias: Any = None,
    return_lse: Any = False,
    return_mixed_value: Any = False,
    backend: str = "auto",
    packing: tuple[Any, Any, Any, Any] | None = None,
) -> Request:
    q, k, v, v_first = _tensors(q, k, v, v_first, packing is not None)
    own, first, own_value, first_value = checks.coefficients(
        v, v_first, lambda_v, lambda_first, q.shape[-2]
    )
    if packing is None:
        cu_q = cu_k = None
        batch, max_q, max_k = q.shape[0], q.shape[1], k.shape[1]
    else:
        cu_q, cu_k, max_q, max_k = packing
        checks.check_packing("q", cu_q, max_q, q, q.shape[0])
        checks.check_packing("k", cu_k, max_k, q, k.shape[0])
        if cu_q.shape != cu_k.shape:
            raise ValueError(
                f"cu_seqlens_k must have cu_seqlens_q's {cu_q.shape[0]} entries, "
                f"got {cu_k.shape[0]}"
            )
        batch = cu_q.shape[0] - 1
    left, right = checks.check_window(window, causal)
    checks.check_sinks(sinks, q)
    check_flag("return_lse", return_lse)
    check_flag("return_mixed_value", return_mixed_value)
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        v_first=v_first,
        lambda_v=own,
        lambda_first=first,
        lambda_v_value=own_value,
        lambda_first_value=first_value,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        window_left=left,
        window_right=right,
        scale=checks.check_scale(scale, q.shape[-1]),
        softcap=checks.check_softcap(softcap),
        sinks=sinks,
        attn_bias=checks.check_bias(attn_bias, q, (batch, q.shape[-2], max_q, max_k)),
        return_lse=return_lse,
        return_mixed_value=return_mixed_value,
    )
    name = "value_residual_attention" if packing is None else "value_residual_attention_varlen"
    return Request(name, backend, BACKENDS, call)


def _prepare_varlen(
    q: Any,
    k: Any,
    v: Any,
    v_first: Any = None,
    lambda_v: Any = 0.5,
    lambda_first: Any = 0.5,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    **options: Any,
) -> Request:
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _prepare(q, k, v, v_first, lambda_v, lambda_first, packing=packing, **options)


def _serve(request: Request) -> Tensor | tuple[Tensor, ...]:
    call: AttentionCall = request.call
    chosen = select(request.op, request.backend, request.backends, call)
    out, lse, mixed = chosen.run(call)
    if call.return_lse and call.return_mixed_value:
        return out, lse, mixed
    if call.return_lse:
        return out, lse
    if call.return_mixed_value:
        return out, mixed
    result: Tensor = out
    return result


@explained_by(_prepare)
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
    return_lse: bool = False,
    return_mixed_value: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention over V' = lambda_v * v + lambda_first * v_first (Zhou et al., arXiv 2410.17897).

    ResFormer mixes the values of the first layer into those of this one; SVFormer attends over
    the first layer's alone (`v=None`); `v_first=None` is plain attention. The mix is fused: V'
    is computed in float32, rounded once to v's dtype, and never saved for backward.

    For each query, in this order: `scale * q.k`, then `softcap * tanh(. / softcap)`, then the
    additive bias, then the masks; the softmax runs over what is left and the sink.

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
        return_lse: also return the natural log of the softmax denominator, sink included,
            (B, Hq, Tq), float32 (float64 for float64 inputs). Differentiable.
        return_mixed_value: also return V', (B, Tk, Hkv, Dv) in v's dtype. Differentiable.
        backend: "auto", "native", "triton", "flash_attn" or "reference". A name never falls back.

    Returns:
        out (B, Tq, Hq, Dv) in q's dtype; or a tuple of out, then the LSE and the mixed value,
        each if asked for. A query that may attend to nothing gives zeros and an LSE of -inf
        (with a sink: the sink), and no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the
            message names it. RuntimeError: the named backend cannot serve the call, the call is
            under vmap, or its gradient is differentiated.

    Under autocast q, k, v and v_first are cast to its dtype; coefficients, sinks and bias are not.
    """
    return _serve(
        _prepare(
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
            return_lse=return_lse,
            return_mixed_value=return_mixed_value,
            backend=backend,
        )
    )


@explained_by(_prepare_varlen)
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
        return_lse: the LSE is (Hq, total_q).
        return_mixed_value: V' is (total_k, Hkv, Dv).

    Returns:
        out (total_q, Hq, Dv), or a tuple as `value_residual_attention`. Rows after the last
        sequence are never read; they come back as zeros (LSE: -inf), with zero gradients.

    Raises:
        As `value_residual_attention`. The contents of cu_seqlens are checked on a CPU, and on a
        GPU under RESFORMER_CHECK=1.
    """
    return _serve(
        _prepare(
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
            return_lse=return_lse,
            return_mixed_value=return_mixed_value,
            backend=backend,
            packing=(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        )
    )
