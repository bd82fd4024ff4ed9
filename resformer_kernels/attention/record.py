"""The normalised form of an attention call, and every check that leads to it.

Checks read metadata alone, except the few numbers in `cu_seqlens` where they lie in host memory.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.checks import (
    DTYPES,
    check_flag,
    check_real,
    check_tensor,
    describe,
    readable,
)
from resformer_kernels._core.coefficients import check_coefficient

_INT = (int, torch.SymInt)


class AttentionCall(NamedTuple):
    """What a backend receives: validated, one form per meaning.

    Fixed length (cu_seqlens_* None): q (B, Tq, Hq, Dk), k (B, Tk, Hkv, Dk), values
    (B, Tk, Hkv, Dv). Packed: no batch axis, time is total_q and total_k. At least one of v and
    v_first is given; where one is absent there are no coefficients (None, and values of 1.0).
    A tensor coefficient has V's rank, attn_bias rank 4; axes of size 1 broadcast. `causal` is
    folded into window_right; -1 is unbounded on either side.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    v_first: Tensor | None
    lambda_v: Tensor | None
    lambda_first: Tensor | None
    lambda_v_value: float
    lambda_first_value: float
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    window_left: int
    window_right: int
    scale: float
    softcap: float
    sinks: Tensor | None
    attn_bias: Tensor | None
    return_lse: bool
    return_mixed_value: bool


def check_values(q: Tensor, k: Tensor, v: Tensor | None, v_first: Tensor | None) -> None:
    """Check q, k and the values against each other."""
    value = v if v is not None else v_first
    if value is None:
        raise ValueError("v and v_first are both None: at least one must be a tensor of values")
    packed = q.dim() == 3
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v), ("v_first", v_first)):
        if tensor is None:
            continue
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] < 1:
        raise ValueError(
            f"k must have q's head_dim {q.shape[-1]}, at least 1, on its last axis, "
            f"got shape {tuple(k.shape)}"
        )
    if not packed and q.shape[0] != k.shape[0]:
        raise ValueError(f"k must have q's batch size {q.shape[0]}, got shape {tuple(k.shape)}")
    q_heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads != 0:
        raise ValueError(
            f"q must have a multiple of k's heads: q has {q_heads} (shape {tuple(q.shape)}), "
            f"k has {kv_heads} (shape {tuple(k.shape)})"
        )
    for name, tensor in (("v", v), ("v_first", v_first)):
        if tensor is None:
            continue
        if tensor.shape[:-1] != k.shape[:-1] or tensor.shape[-1] < 1:
            raise ValueError(
                f"{name} must have k's axes {tuple(k.shape[:-1])} and a head_dim of at least 1, "
                f"got shape {tuple(tensor.shape)}"
            )
        if tensor.shape != value.shape:
            raise ValueError(
                f"v_first must have v's shape {tuple(value.shape)}, got {tuple(tensor.shape)}"
            )


def coefficients(
    v: Tensor | None, v_first: Tensor | None, lambda_v: object, lambda_first: object, heads: int
) -> tuple[Tensor | None, Tensor | None, float, float]:
    """Check lambda_v and lambda_first; return them as (tensor, tensor, float, float)."""
    if v is None or v_first is None:
        absent = "v" if v is None else "v_first"
        for name, value in (("lambda_v", lambda_v), ("lambda_first", lambda_first)):
            if isinstance(value, Tensor):
                raise ValueError(
                    f"{name} is {describe(value)}, but {absent} is None: with one source of "
                    "values nothing is mixed and the tensor would get no gradient; pass "
                    f"{absent}, or leave {name} a float"
                )
            check_real(name, value)
        return None, None, 1.0, 1.0
    first, first_value = check_coefficient("lambda_first", lambda_first, v, query_heads=heads)
    own, own_value = check_coefficient("lambda_v", lambda_v, v, query_heads=heads)
    return own, first, own_value, first_value


def check_window(window: object, causal: object, name: str = "window") -> tuple[int, int]:
    """Fold `causal` into the window; (left, right), -1 unbounded. `name` is what errors call it."""
    check_flag("causal", causal)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{name} must be a pair (left, right) of ints, got {describe(window)}")
    for size in window:
        if not isinstance(size, _INT) or isinstance(size, bool):
            raise TypeError(f"{name} must be a pair of ints, got {describe(window)}")
        if size < -1:
            raise ValueError(f"{name} takes sizes of 0 or more, or -1 (unbounded), got {window}")
    left, right = window
    return left, 0 if causal else right


def check_scale(scale: Any, head_dim: int, name: str = "scale") -> float:
    if scale is None:
        return float(head_dim**-0.5)
    check_real(name, scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{name} must be finite, got {scale}")
    return float(scale)


def check_softcap(softcap: Any) -> float:
    check_real("softcap", softcap)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be 0 (off) or a positive finite number, got {softcap}")
    return float(softcap)


def check_sinks(sinks: Any, q: Tensor) -> None:
    if sinks is None:
        return
    heads = q.shape[-2]
    check_tensor("sinks", sinks, 1, f"({heads},), one logit per query head")
    if sinks.shape[0] != heads:
        raise ValueError(
            f"sinks must be ({heads},), one logit per query head, got shape {tuple(sinks.shape)}"
        )
    if sinks.dtype != q.dtype and sinks.dtype is not torch.float32:
        raise TypeError(f"sinks must be float32 or q's dtype {q.dtype}, got {sinks.dtype}")
    if sinks.device != q.device:
        raise ValueError(f"sinks must be on q's device {q.device}, got {sinks.device}")


def check_bias(bias: Any, q: Tensor, target: tuple[int, int, int, int]) -> Tensor | None:
    """Check attn_bias against the (B, Hq, Tq, Tk) it broadcasts to; return it with four axes."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(
            f"attn_bias must be a tensor that broadcasts to {target}, got {describe(bias)}"
        )
    if bias.layout is not torch.strided:
        raise TypeError(f"attn_bias must be a dense tensor, got layout {bias.layout}")
    if bias.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(
            f"attn_bias must be bool (True = attend), float32 or q's dtype {q.dtype}, "
            f"got {bias.dtype}"
        )
    if bias.device != q.device:
        raise ValueError(f"attn_bias must be on q's device {q.device}, got {bias.device}")
    missing = 4 - bias.dim()
    fits = missing >= 0
    if fits:
        for size, full in zip(bias.shape, target[missing:], strict=True):
            fits = fits and (size == 1 or size == full)
    if not fits:
        raise ValueError(
            f"attn_bias must broadcast to (batch, query heads, queries, keys) = {target}, "
            f"got shape {tuple(bias.shape)}"
        )
    return bias[(None,) * missing] if missing else bias


def check_packing(name: str, cu_seqlens: Any, max_seqlen: Any, q: Tensor, total: int) -> None:
    """Check one of the two cu_seqlens and its max_seqlen; `name` is "q" or "k"."""
    argument = f"cu_seqlens_{name}"
    check_tensor(argument, cu_seqlens, 1, "(batch + 1,), int32")
    if cu_seqlens.dtype is not torch.int32:
        raise TypeError(f"{argument} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{argument} must be on q's device {q.device}, got {cu_seqlens.device}")
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{argument} must have batch + 1 entries, got none")
    longest = f"max_seqlen_{name}"
    if not isinstance(max_seqlen, _INT) or isinstance(max_seqlen, bool):
        raise TypeError(f"{longest} must be an int, got {describe(max_seqlen)}")
    if max_seqlen < 0:
        raise ValueError(f"{longest} must be 0 or more, got {max_seqlen}")
    if readable(cu_seqlens):
        _check_offsets(argument, cu_seqlens.tolist(), longest, max_seqlen, name, total)


def _check_offsets(
    argument: str, offsets: list[int], longest: str, max_seqlen: Any, name: str, total: int
) -> None:
    if offsets[0] != 0:
        raise ValueError(f"{argument} must start at 0, got {offsets[0]}")
    found = 0
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(
                f"{argument} must not decrease, got {offsets[i]} after {offsets[i - 1]} "
                f"at index {i}"
            )
        found = max(found, offsets[i] - offsets[i - 1])
    if offsets[-1] > total:
        raise ValueError(f"{argument} must end within {name}'s {total} tokens, got {offsets[-1]}")
    if found > max_seqlen:
        raise ValueError(
            f"{longest} must be at least the longest sequence of {argument}, {found}, "
            f"got {max_seqlen}"
        )
