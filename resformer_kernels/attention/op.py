"""Schemas and fakes of the attention ops; torch alone is needed.

One schema, two namespaces: `resformer`, whose implementations C++ supplies, and `resformer_triton`,
whose launcher is imported, and Triton with it, when an op is first called.

Both ops serve fixed-length (B, T, H, D) and packed (total, H, D) tensors; the latter come with
`cu_seqlens`. Coefficients have V's rank and attn_bias rank 4, with axes of size 1 where they
broadcast. What was not asked for comes back with no elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.old import vmap_error

_SHARED = (
    "Tensor q, Tensor k, Tensor? v, Tensor? v_first, "
    "Tensor? lambda_v, Tensor? lambda_first, float lambda_v_value, float lambda_first_value, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "int window_left, int window_right, float scale, float softcap, "
    "Tensor? sinks, Tensor? attn_bias, "
)
FORWARD = "value_residual_attention_forward"
BACKWARD = "value_residual_attention_backward"

_SCHEMAS = (
    f"{FORWARD}({_SHARED}bool return_lse, bool return_mixed_value) "
    "-> (Tensor out, Tensor lse, Tensor mixed)",
    f"{BACKWARD}(Tensor grad_out, Tensor? grad_lse, Tensor? grad_mixed, {_SHARED}"
    "Tensor out, Tensor lse, int grad_mask) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dv_first, "
    "Tensor dlambda_v, Tensor dlambda_first, Tensor dsinks, Tensor dattn_bias)",
)
NATIVE, TRITON = "resformer", "resformer_triton"

VMAP_ERROR = vmap_error("value_residual_attention")


def _fresh(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype or like.dtype)


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


def _triton_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from resformer_kernels.attention.triton import launch as triton_launch

    return triton_launch.forward(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from resformer_kernels.attention.triton import backward as triton_gradients

    return triton_gradients.backward(*arguments)


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "FRAGMENT")
    fakes: tuple[Callable[..., Any], ...] = (_forward_fake, _backward_fake)
    for name, schema, fake in zip((FORWARD, BACKWARD), _SCHEMAS, fakes, strict=True):
        library.define(schema)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        library.impl(name, _no_vmap, "FuncTorchBatched")
    return library


# Libraries unregister what they hold when they are collected.
_libraries = {namespace: _define(namespace) for namespace in (NATIVE, TRITON)}
# CPU tensors are for Triton's interpreter.
for _key in ("CUDA", "CPU"):
    _libraries[TRITON].impl(FORWARD, _triton_forward, _key)
    _libraries[TRITON].impl(BACKWARD, _triton_backward, _key)
