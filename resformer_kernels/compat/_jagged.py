"""Jagged nested tensors, which hold their sequences one after the other along one axis.

(B, H, *, D) tensors are attended as packed sequences. (B, *, T, D) tensors have as many matrices
(T, D) in a sequence as this is long: each is attended by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_dense, describe
from resformer_kernels.attention.api import value_residual_attention_varlen
from resformer_kernels.compat._heads_first import check_heads, check_inputs

_NAMES = ("query", "key", "value", "v_first")
_MIX = ("lambda_v", "lambda_first")
_SEQUENCES = 2
"""The axis of sequences of (B, H, *, D)."""


def attend(
    tensors: Sequence[Any],
    mix: Sequence[Any],
    attn_mask: Any,
    is_causal: bool,
    enable_gqa: bool,
    options: dict[str, Any],
    dense: Callable[[Sequence[Any]], Tensor],
) -> Any:
    """`scaled_dot_product_attention` of (query, key, value, v_first), of which one is jagged.

    `mix` has lambda_v and lambda_first, `options` the op's other keywords, and `dense` is the call
    on dense tensors in place of these.
    """
    given = {n: x for n, x in zip(_NAMES, tensors, strict=True) if x is not None or n in _NAMES[:2]}
    axes = {x._ragged_idx for x in given.values() if _is_jagged(x)}
    axis = 1 if axes == {1} else _SEQUENCES
    for name, x in given.items():
        _check(name, x, axis)
    if attn_mask is not None:
        raise ValueError("attn_mask must be None with nested tensors, as in PyTorch")
    rows = [x if x is None else x.values() for x in tensors]
    check_inputs(*rows)
    query, key = tensors[:2]
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"key must have query's batch size {query.shape[0]}, got {key.shape[0]}")
    for name, x in given.items():
        if name not in _NAMES[:2] or axis == 1:
            _check_sequences(name, x, key, axis)
    if axis == 1:
        return _rewrapped(dense(rows), query)
    for name in _NAMES[2:]:
        if name in given and given[name].shape[1] != key.shape[1]:
            raise ValueError(
                f"{name} must have key's {key.shape[1]} heads, got {given[name].shape[1]}"
            )
    check_heads(query.shape[1], key.shape[1], enable_gqa)
    out = _attend_packed(query, key, rows, mix, is_causal, options)
    return _rewrapped(out, query).transpose(1, 2)


def _attend_packed(
    query: Any,
    key: Any,
    rows: Sequence[Tensor | None],
    mix: Sequence[Any],
    is_causal: bool,
    options: dict[str, Any],
) -> Any:
    """(total, H, Dv) of rows (H, total, D)."""
    longest = query._get_max_seqlen(), key._get_max_seqlen()
    bias = None
    if is_causal and not _same_sequences(query, key, _SEQUENCES):
        # The op aligns each sequence's last query and key, PyTorch the first.
        bias = torch.ones(longest, dtype=torch.bool, device=query.device).tril()
    q, k, v, first = (x if x is None else x.transpose(0, 1) for x in rows)
    assert q is not None
    assert k is not None
    own, other = (_coefficient(name, x, key) for name, x in zip(_MIX, mix, strict=True))
    return value_residual_attention_varlen(
        q,
        k,
        v,
        first,
        own,
        other,
        cu_seqlens_q=query.offsets().int(),
        cu_seqlens_k=key.offsets().int(),
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        causal=is_causal and bias is None,
        attn_bias=bias,
        **options,
    )


def _rewrapped(rows: Tensor, like: Any) -> Tensor:
    """rows (total, ...) as a jagged tensor (B, *, ...) with the sequences of `like`."""
    return torch.nested.nested_tensor_from_jagged(
        rows,
        like.offsets(),
        min_seqlen=like._maybe_min_seqlen,
        max_seqlen=like._maybe_max_seqlen,
    )


def _is_jagged(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.jagged


def _check(name: str, x: Any, axis: int) -> None:
    axes = "(B, *, time, head_dim)" if axis == 1 else "(B, heads, *, head_dim)"
    wanted = f"a jagged nested tensor {axes} without holes, as all the others must be"
    if not _is_jagged(x):
        raise TypeError(f"{name} must be {wanted}, got {describe(x)}")
    if x.dim() != 4 or x._ragged_idx != axis or x.lengths() is not None:
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}")


def _same_sequences(x: Any, y: Any, axis: int) -> bool:
    """Whether the sequences of x have the lengths of those of y."""
    return x.shape[axis] == y.shape[axis] or torch.equal(x.offsets(), y.offsets())


def _check_sequences(name: str, x: Any, key: Any, axis: int) -> None:
    if x.shape[0] != key.shape[0] or not _same_sequences(x, key, axis):
        raise ValueError(
            f"{name} must have key's sequences, of offsets {key.offsets().tolist()}, "
            f"got {x.offsets().tolist()}"
        )


def _coefficient(name: str, x: Any, key: Any) -> Any:
    """A coefficient of (B, Hkv, *, Dv) values as one of (total, Hkv, Dv); numbers are unchanged."""
    if not isinstance(x, Tensor):
        return x
    if _is_jagged(x):
        _check(name, x, _SEQUENCES)
        _check_sequences(name, x, key, _SEQUENCES)
        rows: Tensor = x.values()
        return rows.transpose(0, 1)
    check_dense(name, x)
    if x.dim() == 4 and x.shape[0] == 1:
        x = x[0]
    if x.dim() > 3 or (x.dim() > 1 and x.shape[-2] != 1):
        raise ValueError(
            f"{name} must be a float, jagged as value is, or broadcast to value's "
            f"(heads, 1, head_dim), got shape {tuple(x.shape)}"
        )
    return x[(None,) * (3 - x.dim())].transpose(0, 1)
