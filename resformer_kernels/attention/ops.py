"""Schemas and fakes of the attention ops. C++ supplies the implementations; torch alone is needed.

Both ops serve fixed-length (B, T, H, D) and packed (total, H, D) tensors; the latter come with
`cu_seqlens`. Coefficients have V's rank and attn_bias rank 4, with axes of size 1 where they
broadcast. What was not asked for comes back with no elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from resformer_kernels._launch import vmap_error

_SHARED = (
    "Tensor q, Tensor k, Tensor? v, Tensor? v_first, "
    "Tensor? lambda_v, Tensor? lambda_first, float lambda_v_value, float lambda_first_value, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "int window_left, int window_right, float scale, float softcap, "
    "Tensor? sinks, Tensor? attn_bias, "
)
FORWARD = "value_residual_attention_forward"
BACKWARD = "value_residual_attention_backward"

_lib = torch.library.Library("resformer", "FRAGMENT")
_lib.define(
    f"{FORWARD}({_SHARED}bool return_lse, bool return_mixed_value) "
    "-> (Tensor out, Tensor lse, Tensor mixed)"
)
_lib.define(
    f"{BACKWARD}(Tensor grad_out, Tensor? grad_lse, Tensor? grad_mixed, {_SHARED}"
    "Tensor out, Tensor lse, int grad_mask) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dv_first, "
    "Tensor dlambda_v, Tensor dlambda_first, Tensor dsinks, Tensor dattn_bias)"
)

VMAP_ERROR = vmap_error("value_residual_attention")


def _fresh(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype or like.dtype)


@torch.library.register_fake(f"resformer::{FORWARD}", lib=_lib)
def _forward_fake(
    q: Tensor, _k: Tensor, v: Tensor | None, v_first: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return_lse, return_mixed_value = rest[-2:]
    value = v if v is not None else v_first
    assert value is not None
    out = _fresh(q, (*q.shape[:-1], value.shape[-1]))
    if not return_lse:
        lse_shape: tuple[int, ...] = (0,)
    elif q.dim() == 3:
        lse_shape = (q.shape[1], q.shape[0])
    else:
        lse_shape = (q.shape[0], q.shape[2], q.shape[1])
    lse = _fresh(q, lse_shape, torch.float32)
    mixed = _fresh(value, value.shape if return_mixed_value else (0,))
    return out, lse, mixed


@torch.library.register_fake(f"resformer::{BACKWARD}", lib=_lib)
def _backward_fake(
    _grad_out: Tensor,
    _grad_lse: Tensor | None,
    _grad_mixed: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    v_first: Tensor | None,
    lambda_v: Tensor | None,
    lambda_first: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    sinks, attn_bias, _out, _lse, grad_mask = rest[-5:]
    leaves = (q, k, v, v_first, lambda_v, lambda_first, sinks, attn_bias)
    # An absent leaf's gradient has q's dtype where the leaf is one of q, k, v, v_first.
    return tuple(
        _fresh(q, (0,), q.dtype if bit < 4 else torch.float32)
        if leaf is None
        else _fresh(leaf, leaf.shape if grad_mask >> bit & 1 else (0,))
        for bit, leaf in enumerate(leaves)
    )


def _no_vmap(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise RuntimeError(VMAP_ERROR)


_lib.impl(FORWARD, _no_vmap, "FuncTorchBatched")
_lib.impl(BACKWARD, _no_vmap, "FuncTorchBatched")
