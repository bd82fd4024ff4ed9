"""PyTorch's `scaled_dot_product_attention` over mixed values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import CAUSAL_BIAS, check_flag, stand_in
from resformer_kernels._core.select import explainable
from resformer_kernels.attention.api import value_residual_attention
from resformer_kernels.compat import _jagged
from resformer_kernels.compat._arguments import refuse, refuse_dropout, scale_of
from resformer_kernels.compat._errors import runtime_errors
from resformer_kernels.compat._heads_first import (
    broadcast_inputs,
    check_inputs,
    fold,
    fold_coefficient,
    fold_finish,
    fold_mask,
    restore_axes,
    wide,
)


@runtime_errors()
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
    exclusive: float | Tensor | None = None,
    exclusive_eps: float | None = None,
    out_gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` over lambda_v * value + lambda_first *
    v_first (Zhou et al., arXiv 2410.17897).

    Without `v_first` it computes what PyTorch's does. Tensors are (..., heads, time, head_dim),
    with at least two axes; without a heads axis there is one head. As in PyTorch, leading axes
    broadcast, and so do heads unless `enable_gqa`. Nothing is copied: the kernels read (B, H, T, D)
    through its strides. (Several leading axes are folded into one, which copies where the strides
    allow no view.)

    Jagged nested tensors (B, H, *, D) are attended as packed sequences, without attn_mask; key and
    values share their sequences, which may differ from query's. The result is jagged as query is.

    Args:
        query: (..., Hq, Tq, Dk); float32, bfloat16, float16 or float64 (float64: reference only).
        key: (..., Hkv, Tk, Dk).
        value: (..., Hkv, Tk, Dv), this layer's values, or None to attend over v_first alone.
        attn_mask: broadcastable to (..., Hq, Tq, Tk): bool (True = attend), or added to the
            scores, float32 or query's dtype. Or a `torch.nn.attention.bias.CausalBias`, of which no
            mask is made. Not together with is_causal.
        dropout_p: must be 0; dropout is not supported.
        is_causal: query i sees keys 0 to i. This is PyTorch's top-left alignment; where Tq and Tk
            differ, `value_residual_attention` and FlashAttention align bottom-right instead.
        scale: multiplies query.key; any finite number. None: 1 / sqrt(Dk).
        enable_gqa: let Hq be a multiple of Hkv; query head h reads KV head h // (Hq / Hkv).
        v_first: (..., Hkv, Tk, Dv), the first layer's values, or None.
        lambda_v: multiplies value. A float, or a tensor, float32 or value's dtype, that broadcasts
            to value's shape without enlarging it. In this layout heads come before time: (),
            (Hkv, 1, 1), (Hkv, 1, Dv), (Tk, 1), (B, 1, Tk, 1), (B, Hkv, Tk, 1), (B, Hkv, Tk, Dv).
            Of jagged values: jagged with their sequences, or without axes of batch and time.
        lambda_first: multiplies v_first; the same forms.
        exclusive, exclusive_eps, out_gate: exclusive self-attention and a gate of the result,
            fused, as in `value_residual_attention`; tensors broadcast to (..., Hq, Tq, 1) and
            (..., Hq, Tq, Dv). Query i stands at key i where is_causal, else at i + Tk - Tq.
        backend: "auto", "native" or "reference". A name never falls back.

    Returns:
        (..., Hq, Tq, Dv) in query's dtype. Its memory order is time before heads, so
        `.transpose(-3, -2).flatten(-2)` is a view. A query that attends to no key gives zeros and
        no gradient, as in PyTorch >= 2.5 (earlier versions gave NaN).

    Raises:
        NotImplementedError: dropout_p above 0; exclusive or out_gate with nested tensors; exclusive
            with is_causal where there are more queries than keys. Otherwise as
            `value_residual_attention`, with the argument names used here; a ValueError or TypeError
            is a RuntimeError too, as PyTorch's.
    """
    refuse_dropout(dropout_p)
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None with is_causal=True: merge the two into one mask")
    options: dict[str, Any] = {"scale": scale_of("scale", scale), "backend": backend}
    tensors, mix = (query, key, value, v_first), (lambda_v, lambda_first)
    finish = (exclusive, exclusive_eps, out_gate)
    if any(isinstance(x, Tensor) and x.layout is torch.jagged for x in tensors):

        def dense(rows: Sequence[Any]) -> Tensor:
            return _attend(rows, mix, finish, None, is_causal, False, enable_gqa, options)

        for name, x in (("exclusive", exclusive), ("out_gate", out_gate)):
            refuse(name, x, "it does not follow the sequences of nested tensors")
        return _jagged.attend(tensors, mix, attn_mask, is_causal, enable_gqa, options, dense)
    check_inputs(*tensors)
    end = False
    if isinstance(attn_mask, Tensor) and stand_in(type(attn_mask)) == CAUSAL_BIAS:
        end = _ends_together(attn_mask, query.shape[-2], key.shape[-2])
        attn_mask, is_causal = None, not end
    if any(x is not None and x.dim() > 2 and x.shape[-3] == 0 for x in tensors):
        # Nothing is attended, and kernels take one head or more: make the heads a batch.
        tensors, mix, finish = _apart(tensors), _apart(mix), _apart(finish)
        return _attend(tensors, mix, finish, None, False, False, False, options).squeeze(-3)
    return _attend(tensors, mix, finish, attn_mask, is_causal, end, enable_gqa, options)


def _ends_together(bias: Any, q_len: int, k_len: int) -> bool:
    """Whether a CausalBias aligns the last query with the last key; else the first with the first.

    As in PyTorch, the lengths that it was made for matter only where it does.
    """
    if bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv:
        return False
    if (bias.seq_len_q, bias.seq_len_kv) != (q_len, k_len):
        raise ValueError(
            f"attn_mask must be made for {q_len} queries and {k_len} keys, got "
            f"causal_lower_right({bias.seq_len_q}, {bias.seq_len_kv})"
        )
    return True


def _apart(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """(..., H, T, D) as (..., H, 1, T, D); what has no heads, or is no tensor, is unchanged."""
    return tuple(x.unsqueeze(-3) if isinstance(x, Tensor) and x.dim() > 2 else x for x in tensors)


def _attend(
    tensors: Sequence[Any],
    mix: Sequence[Any],
    finish: Sequence[Any],
    attn_mask: Any,
    is_causal: bool,
    end: bool,
    enable_gqa: bool,
    options: dict[str, Any],
) -> Tensor:
    """The call on checked tensors. `is_causal` aligns first queries and keys, `end` the last."""
    rank = max(x.dim() for x in tensors if x is not None)
    channels = next(x for x in tensors[2:] if x is not None).shape[-1]
    q, k, v, first = broadcast_inputs([x if x is None else wide(x) for x in tensors], enable_gqa)
    source = v if v is not None else first
    assert source is not None
    if channels == 0:
        mix, finish = _wide(mix), _wide(finish)
    own, other = (
        fold_coefficient(name, x, source.shape, rank)
        for name, x in zip(("lambda_v", "lambda_first"), mix, strict=True)
    )
    options = {**options, **fold_finish(finish, q, source.shape[-1], rank)}
    mask = fold_mask(attn_mask, q, k, rank)
    axes = tuple(q.shape[:-3])
    q_len, k_len = q.shape[-2], k.shape[-2]
    q, k = fold(q, axes), fold(k, axes)
    v, first = (x if x is None else fold(x, axes) for x in (v, first))
    causal, window = is_causal or end, (-1, -1)
    # Comparing for equality first is the only guard that torch.compile and torch.export then put
    # on the lengths.
    if is_causal and q_len != k_len:
        if q_len > k_len:
            refuse("exclusive", finish[0], "with is_causal, query is longer than key")
            # The op aligns bottom-right: its query i has the position of key i + k_len - q_len.
            causal, window = False, (-1, q_len - k_len)
        else:
            # No query sees the keys after the last query; without them the alignments agree.
            k, v, first, own, other = (_until(x, q_len) for x in (k, v, first, own, other))
    out = value_residual_attention(
        q, k, v, first, own, other, causal=causal, window=window, attn_bias=mask, **options
    )
    restored = restore_axes(out.transpose(1, 2), axes, rank)
    return restored if channels > 0 else restored[..., :0]


def _wide(factors: Sequence[Any]) -> tuple[Any, ...]:
    """Tensors as wide as values without channels become; what is no tensor is unchanged."""
    return tuple(wide(x) if isinstance(x, Tensor) else x for x in factors)


def _until(x: Any, length: int) -> Any:
    """The first `length` steps of x, (B, T, H, D) or with axes of size 1; numbers are unchanged."""
    if not isinstance(x, Tensor) or x.dim() < 4 or x.shape[1] == 1:
        return x
    return x[:, :length]
