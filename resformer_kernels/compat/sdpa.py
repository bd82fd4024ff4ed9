"""PyTorch's `scaled_dot_product_attention` over mixed values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.checks import check_flag
from resformer_kernels._core.select import explainable
from resformer_kernels.attention.api import value_residual_attention
from resformer_kernels.attention.record import check_scale
from resformer_kernels.compat._heads_first import (
    broadcast_inputs,
    check_inputs,
    fold,
    fold_coefficient,
    fold_mask,
    restore_axes,
)
from resformer_kernels.compat._refused import refuse_dropout


@explainable
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    v_first: Tensor | None = None,
    lambda_v: float | Tensor = 0.5,
    lambda_first: float | Tensor = 0.5,
    backend: str = "auto",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` over lambda_v * value + lambda_first *
    v_first (Zhou et al., arXiv 2410.17897).

    Without `v_first` it computes what PyTorch's does. Tensors are (..., heads, time, head_dim),
    with at least two axes; without a heads axis there is one head. As in PyTorch, leading axes
    broadcast, and so do heads unless `enable_gqa`. Nothing is copied: the kernels read (B, H, T, D)
    through its strides. (Several leading axes are folded into one, which copies where the strides
    allow no view.)

    Args:
        query: (..., Hq, Tq, Dk); float32, bfloat16, float16 or float64 (float64: reference only).
        key: (..., Hkv, Tk, Dk).
        value: (..., Hkv, Tk, Dv), this layer's values, or None to attend over v_first alone.
        attn_mask: broadcastable to (..., Hq, Tq, Tk): bool (True = attend), or added to the
            scores, float32 or query's dtype. Not together with is_causal.
        dropout_p: must be 0; dropout is not supported.
        is_causal: query i sees keys 0 to i. This is PyTorch's top-left alignment; where Tq and Tk
            differ, `value_residual_attention` and FlashAttention align bottom-right instead.
        scale: multiplies query.key; any finite number. None: 1 / sqrt(Dk).
        enable_gqa: let Hq be a multiple of Hkv; query head h reads KV head h // (Hq / Hkv).
        v_first: (..., Hkv, Tk, Dv), the first layer's values, or None.
        lambda_v: multiplies value. A float, or a tensor, float32 or value's dtype, that broadcasts
            to value's shape without enlarging it. In this layout heads come before time: (),
            (Hkv, 1, 1), (Hkv, 1, Dv), (Tk, 1), (B, 1, Tk, 1), (B, Hkv, Tk, 1), (B, Hkv, Tk, Dv).
        lambda_first: multiplies v_first; the same forms.
        backend: "auto", "native" or "reference". A name never falls back.

    Returns:
        (..., Hq, Tq, Dv) in query's dtype. Its memory order is time before heads, so
        `.transpose(-3, -2).flatten(-2)` is a view. A query that attends to no key gives zeros and
        no gradient, as in PyTorch >= 2.5 (earlier versions gave NaN).

    Raises:
        NotImplementedError: dropout_p above 0. Otherwise as `value_residual_attention`, with the
            argument names used here.
    """
    refuse_dropout(dropout_p)
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None with is_causal=True: merge the two into one mask")
    check_inputs(query, key, value, v_first)
    rank = query.dim()
    q, k, v, first = broadcast_inputs(query, key, value, v_first, enable_gqa)
    source = v if v is not None else first
    assert source is not None
    own = fold_coefficient("lambda_v", lambda_v, source, rank)
    other = fold_coefficient("lambda_first", lambda_first, source, rank)
    mask = fold_mask(attn_mask, q, k, rank)
    axes = tuple(q.shape[:-3])
    q_len, k_len = q.shape[-2], k.shape[-2]
    q, k = fold(q, axes), fold(k, axes)
    v, first = (x if x is None else fold(x, axes) for x in (v, first))
    causal, window = is_causal, (-1, -1)
    # Comparing for equality first is the only guard that torch.compile and torch.export then put
    # on the lengths.
    if is_causal and q_len != k_len:
        if q_len > k_len:
            # The op aligns bottom-right: its query i has the position of key i + k_len - q_len.
            causal, window = False, (-1, q_len - k_len)
        else:
            # No query sees the keys after the last query; without them the alignments agree.
            k, v, first, own, other = (_until(x, q_len) for x in (k, v, first, own, other))
    out = value_residual_attention(
        q,
        k,
        v,
        first,
        own,
        other,
        causal=causal,
        window=window,
        scale=check_scale(scale, query.shape[-1]),
        attn_bias=mask,
        backend=backend,
    )
    return restore_axes(out.transpose(1, 2), axes, rank)


def _until(x: Any, length: int) -> Any:
    """The first `length` steps of x, (B, T, H, D) or with axes of size 1; numbers are unchanged."""
    if not isinstance(x, Tensor) or x.dim() < 4 or x.shape[1] == 1:
        return x
    return x[:, :length]
