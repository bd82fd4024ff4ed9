"""The record of an attention call, and every check that leads to it.

Checks read metadata alone, except the few numbers in `cu_seqlens` where they lie in host memory.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.checks import (
    DTYPES,
    alone,
    autocast,
    check_cu_seqlens,
    check_dense,
    check_flag,
    check_tensor,
    describe,
    integer,
    integers,
    real,
)
from resformer_kernels._core.coefficients import check_coefficient
from resformer_kernels._core.op import SymInt, refuse_vmap
from resformer_kernels.attention.epilogue import check_epilogue

FIXED, PACKED = "value_residual_attention", "value_residual_attention_varlen"
"""The public functions."""

LEAVES = (
    *("q", "k", "v", "v_first", "lambda_v", "lambda_first", "sinks", "attn_bias"),
    *("exclusive", "out_gate"),
)
"""Arguments that have gradients, in the order of the backward op's results and of `grad_mask`."""

_FIXED_Q = "(batch, time, heads, head_dim)"
_FIXED_K = "(batch, time, kv_heads, head_dim)"
_PACKED_Q = "(total_tokens, heads, head_dim)"
_PACKED_K = "(total_tokens, kv_heads, head_dim)"


class AttentionCall(NamedTuple):
    """A validated call, its fields in the order of the op's arguments; one form per meaning.

    Fixed length (cu_seqlens_* None): q (B, Tq, Hq, Dk), k (B, Tk, Hkv, Dk), values
    (B, Tk, Hkv, Dv). Packed: no batch axis, time is total_q and total_k. At least one of v and
    v_first is given; where one is absent there are no coefficients (None, and values of 1.0).
    A tensor coefficient has V's rank, exclusive and out_gate q's, attn_bias rank 4; axes of size 1
    broadcast. `causal` is folded into window_right; -1 is unbounded on either side. Nothing is
    excluded where `exclusive` is None and its value 0. The last two fields ask for what backward
    reads: see `epilogue`.
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
    max_seqlen_q: SymInt
    max_seqlen_k: SymInt
    window_left: int
    window_right: int
    scale: float
    softcap: float
    sinks: Tensor | None
    attn_bias: Tensor | None
    return_lse: bool
    return_mixed_value: bool
    exclusive: Tensor | None = None
    exclusive_value: float = 0.0
    exclusive_eps: float = 1e-6
    out_gate: Tensor | None = None
    return_along: bool = False
    return_ungated: bool = False

    @property
    def excludes(self) -> bool:
        """Whether the part along the query's own value is taken from the output."""
        return self.exclusive is not None or self.exclusive_value != 0.0

    @property
    def plain(self) -> bool:
        """Whether nothing follows the softmax."""
        return not self.excludes and self.out_gate is None

    @property
    def packed(self) -> bool:
        """Whether sequences lie one after the other, without a batch axis."""
        return self.cu_seqlens_q is not None

    @property
    def mixes(self) -> bool:
        """Whether V' has two sources."""
        return self.v is not None and self.v_first is not None

    @property
    def value(self) -> Tensor:
        """A source of V': its shape and dtype are those of V'."""
        value = self.v if self.v is not None else self.v_first
        assert value is not None
        return value

    @property
    def sequences(self) -> int:
        """Number of sequences: the batch size, or the number of packed ones."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return self.k.shape[-2]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[-2] // self.kv_heads

    @property
    def max_rows(self) -> int:
        """The most queries of a sequence, times the query heads that share a KV head."""
        return self.max_seqlen_q * self.group

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """The arguments that `LEAVES` names."""
        return tuple(getattr(self, name) for name in LEAVES)


def check_call(
    q: Any,
    k: Any,
    v: Any,
    v_first: Any,
    lambda_v: Any,
    lambda_first: Any,
    *,
    packing: tuple[Any, Any, Any, Any] | None = None,
    causal: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    sinks: Any,
    attn_bias: Any,
    exclusive: Any,
    exclusive_eps: Any,
    out_gate: Any,
    return_lse: Any,
    return_mixed_value: Any,
) -> AttentionCall:
    """Check and normalise the arguments of a public function.

    `packing` is None, or (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k).
    """
    packed = packing is not None
    rank, axes_q, axes_k = (3, _PACKED_Q, _PACKED_K) if packed else (4, _FIXED_Q, _FIXED_K)
    check_tensor("q", q, rank, axes_q)
    check_tensor("k", k, rank, axes_k)
    for name, tensor in (("v", v), ("v_first", v_first)):
        if tensor is not None:
            check_tensor(name, tensor, rank, f"{axes_k} or None")
    refuse_vmap(FIXED, (q,))
    q, k, v, v_first = (x if x is None else autocast(x) for x in (q, k, v, v_first))
    check_values(q, k, v, v_first)
    own, first, own_value, first_value = coefficients(
        v, v_first, lambda_v, lambda_first, q.shape[-2]
    )
    cu_q = cu_k = None
    max_q, max_k = q.shape[1], k.shape[1]
    batch = q.shape[0]
    if packing is not None:
        cu_q, cu_k, max_q, max_k = packing
        max_q = _check_packing("q", cu_q, max_q, q)
        max_k = _check_packing("k", cu_k, max_k, k)
        if cu_q.shape != cu_k.shape:
            raise ValueError(
                f"cu_seqlens_k must have cu_seqlens_q's {cu_q.shape[0]} entries, "
                f"got {cu_k.shape[0]}"
            )
        batch = cu_q.shape[0] - 1
    left, right = check_window(window, causal)
    check_sinks(sinks, q)
    check_flag("return_lse", return_lse)
    check_flag("return_mixed_value", return_mixed_value)
    value = v if v is not None else v_first
    return AttentionCall(
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
        scale=check_scale(scale, q.shape[-1]),
        softcap=check_softcap(softcap),
        sinks=sinks,
        attn_bias=check_bias(attn_bias, q, (batch, q.shape[-2], max_q, max_k)),
        return_lse=return_lse,
        return_mixed_value=return_mixed_value,
        **check_epilogue(exclusive, exclusive_eps, out_gate, q, value.shape[-1], k.shape[-2]),
    )


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
            real(name, value)
        return None, None, 1.0, 1.0
    first, first_value = check_coefficient("lambda_first", lambda_first, v, other_heads=heads)
    own, own_value = check_coefficient("lambda_v", lambda_v, v, other_heads=heads)
    return own, first, own_value, first_value


def check_window(window: object, causal: object, name: str = "window") -> tuple[int, int]:
    """Fold `causal` into the window; (left, right), -1 unbounded. `name` is what errors call it."""
    check_flag("causal", causal)
    sides = [] if alone(window) else integers(name, window)
    if len(sides) != 2:
        raise TypeError(f"{name} must be a pair (left, right) of ints, got {describe(window)}")
    left, right = sides
    if left < -1 or right < -1:
        raise ValueError(f"{name} takes sizes of 0 or more, or -1 (unbounded), got {window}")
    return left, 0 if causal else right


def check_scale(scale: Any, head_dim: int, name: str = "scale") -> float:
    if scale is None:
        return float(head_dim**-0.5)
    scale = real(name, scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{name} must be finite, got {scale}")
    return float(scale)


def check_softcap(softcap: Any) -> float:
    softcap = real("softcap", softcap)
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
    check_dense("attn_bias", bias)
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


def _check_packing(name: str, cu_seqlens: Any, max_seqlen: Any, rows: Tensor) -> int:
    """Check one of the two cu_seqlens; its max_seqlen. `rows` is q or k, as `name` says."""
    offsets = check_cu_seqlens(
        cu_seqlens,
        name,
        rows,
        f"{name}'s {{}} tokens",
        argument=f"cu_seqlens_{name}",
        sequences="batch",
    )
    argument = f"max_seqlen_{name}"
    most = integer(argument, max_seqlen, 0)
    if offsets is None:
        return most
    longest = max((end - start for start, end in itertools.pairwise(offsets)), default=0)
    if longest > most:
        raise ValueError(
            f"{argument} must be at least the longest sequence of cu_seqlens_{name}, {longest}, "
            f"got {most}"
        )
    return most
