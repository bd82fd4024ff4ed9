"""Convert PyTorch's (..., heads, time, head_dim) layout to (batch, time, heads, head_dim)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from resformer_kernels._core.checks import DTYPES, autocast_dtype, check_dense, describe

_AXES = "(..., heads, time, head_dim)"
_DENSE = f"{_AXES}, or jagged as query, key and value are"
_COEFFICIENT = "a float or a tensor that broadcasts to value's shape"


def check_inputs(query: Any, key: Any, value: Any, v_first: Any) -> None:
    """Check types, ranks, dtypes, devices and the last two axes; errors use SDPA's names."""
    if value is None and v_first is None:
        raise ValueError("value and v_first are both None: at least one must be a tensor of values")
    for name, x in (("query", query), ("key", key), ("value", value), ("v_first", v_first)):
        if x is None and name in ("value", "v_first"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor {_AXES}, got {describe(x)}")
        check_dense(name, x, _DENSE)
        if x.dim() < 2:
            raise ValueError(f"{name} must be {_AXES}, at least the last two, got {describe(x)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if autocast_dtype(x.device, x.dtype) != autocast_dtype(query.device, query.dtype):
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {x.device}")
        if name in ("value", "v_first") and x.shape[-2] != key.shape[-2]:
            raise ValueError(
                f"{name} must have key's length {key.shape[-2]} on its axis before the last, "
                f"got shape {tuple(x.shape)}"
            )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"key must have query's head_dim {query.shape[-1]} on its last axis, "
            f"got shape {tuple(key.shape)}"
        )
    if value is not None and v_first is not None and value.shape[-1] != v_first.shape[-1]:
        raise ValueError(
            f"v_first must have value's head_dim {value.shape[-1]} on its last axis, "
            f"got shape {tuple(v_first.shape)}"
        )


def broadcast_inputs(
    tensors: Sequence[Tensor | None], enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Views of query, key, value and v_first with at least a batch axis, equal leading axes, and
    heads as the op takes them."""
    named = dict(zip(("query", "key", "value", "v_first"), tensors, strict=True))
    rank = max(4, *(x.dim() for x in named.values() if x is not None))
    q, k, *values = (x if x is None else x[(None,) * (rank - x.dim())] for x in named.values())
    assert q is not None
    assert k is not None
    keyed = [k, *(x for x in values if x is not None)]
    lead = _common([x.shape[:-3] for x in (q, *keyed)], named)
    (kv_heads,) = _common([x.shape[-3:-2] for x in keyed], named)
    heads = kv_heads if q.shape[-3] == 1 and not enable_gqa else q.shape[-3]
    # The kernels broadcast a single KV head to all query heads without copying it.
    check_heads(heads, kv_heads, kv_heads == 1 or enable_gqa)
    k, *values = (
        x if x is None else x.expand(*lead, kv_heads, *x.shape[-2:]) for x in (k, *values)
    )
    assert k is not None
    return q.expand(*lead, heads, *q.shape[-2:]), k, values[0], values[1]


def check_heads(heads: int, kv_heads: int, enable_gqa: bool) -> None:
    """ValueError unless query has as many heads as key and value, or a multiple where allowed."""
    grouped = kv_heads > 0 and heads % kv_heads == 0
    if heads != kv_heads and not (enable_gqa and grouped):
        hint = "; enable_gqa=True allows a multiple" if grouped else ""
        raise ValueError(
            f"query must have as many heads as key and value, {kv_heads}, got {heads}{hint}"
        )


def _common(shapes: Sequence[torch.Size], named: dict[str, Tensor | None]) -> torch.Size:
    common = list(shapes[0])
    for shape in shapes[1:]:
        for axis, size in enumerate(shape):
            if common[axis] == 1:
                common[axis] = size
            elif size not in (1, common[axis]):
                given = {name: tuple(x.shape) for name, x in named.items() if x is not None}
                raise ValueError(f"axes before the last two must broadcast, got shapes {given}")
    return torch.Size(common)


def wide(x: Tensor) -> Tensor:
    """x; where it has no channels, with one of zeros: kernels take one or more."""
    return functional.pad(x, (0, 1)) if x.dim() > 0 and x.shape[-1] == 0 else x


def fold(x: Tensor, axes: Sequence[int]) -> Tensor:
    """(*axes, H, T, D), where axes may be of size 1, as (B, T, H, D)."""
    return _one_batch(x, axes).transpose(1, 2)


def _one_batch(x: Tensor, axes: Sequence[int]) -> Tensor:
    if len(axes) == 1:
        return x
    if any(size != 1 for size in x.shape[:-3]):
        x = x.expand(*axes, *x.shape[-3:])
    return x.flatten(0, -4)


def fold_coefficient(
    name: str, coefficient: Any, full: Sequence[int], rank: int, takes: str = _COEFFICIENT
) -> Any:
    """Convert a coefficient of (..., H, T, D) tensors to one of (B, T, H, D) tensors.

    Numbers are returned unchanged. `full` is the tensors' shape, `rank` their rank before they got
    a batch axis; errors say that the argument `takes` such.
    """
    if not isinstance(coefficient, Tensor):
        return coefficient
    check_dense(name, coefficient)
    target = tuple(full[-rank:])
    if not _broadcasts(coefficient, target):
        heads, hint = full[-3], ""
        if tuple(coefficient.shape) in ((heads,), (heads, 1)):
            kind = "KV" if takes is _COEFFICIENT else "query"
            hint = f"; one per {kind} head has shape ({heads}, 1, 1) where time is axis -2"
        raise ValueError(
            f"{name} must be {takes} {target} without enlarging it, "
            f"got shape {tuple(coefficient.shape)}{hint}"
        )
    return fold(coefficient[(None,) * (len(full) - coefficient.dim())], full[:-3])


def fold_finish(finish: Sequence[Any], query: Tensor, channels: int, rank: int) -> dict[str, Any]:
    """Convert exclusive, exclusive_eps and out_gate of a result (..., H, T, channels); `rank` as in
    `fold_coefficient`."""
    exclusive, eps, gate = finish
    rows = query.shape[:-1]
    takes = "a float or a tensor that broadcasts to a number for each query and head,"
    gates = "a tensor that broadcasts to the result's shape"
    return {
        "exclusive": fold_coefficient("exclusive", exclusive, (*rows, 1), rank, takes),
        "exclusive_eps": eps,
        "out_gate": fold_coefficient("out_gate", gate, (*rows, channels), rank, gates),
    }


def fold_mask(mask: Any, query: Tensor, key: Tensor, rank: int) -> Tensor | None:
    """Convert a mask over (..., H, T, D) tensors to the op's attn_bias."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {describe(mask)}")
    check_dense("attn_mask", mask)
    dtype = autocast_dtype(query.device, query.dtype)
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        raise TypeError(
            f"attn_mask must be bool (True = attend), float32 or query's dtype {dtype}, "
            f"got {mask.dtype}"
        )
    full = (*query.shape[:-1], key.shape[-2])
    target = full[-rank:]
    if not _broadcasts(mask, target):
        raise ValueError(
            "attn_mask must broadcast to (..., heads, queries, keys) = "
            f"{tuple(target)}, got shape {tuple(mask.shape)}"
        )
    return _one_batch(mask[(None,) * (query.dim() - mask.dim())], query.shape[:-3])


def _broadcasts(x: Tensor, target: Sequence[int]) -> bool:
    """Whether x broadcasts to target without enlarging it."""
    missing = len(target) - x.dim()
    if missing < 0:
        return False
    return all(size in (1, full) for size, full in zip(x.shape, target[missing:], strict=True))


def restore_axes(out: Tensor, axes: Sequence[int], rank: int) -> Tensor:
    """Unfold the batch axis of (B, H, T, D) into `axes`; the result has `rank` axes."""
    if rank < 4:
        return out[(0,) * (4 - rank)]
    return out if len(axes) == 1 else out.unflatten(0, axes)
