"""What the functions of every version of FlashAttention share: attention over q, k and v."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

from resformer_kernels._core import dtensors
from resformer_kernels._core.checks import DTYPES, check_tensor, integer, readable
from resformer_kernels._core.select import explaining
from resformer_kernels.attention.api import (
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.attention.record import check_call
from resformer_kernels.compat._arguments import check_ints, number, scale_of, window_of
from resformer_kernels.kvcache.packed import packing


class Added(NamedTuple):
    """The arguments that the drop-ins add."""

    v_first: Any
    lambda_v: Any
    lambda_first: Any
    exclusive: Any
    exclusive_eps: Any
    out_gate: Any


class Scores(NamedTuple):
    """The arguments that make scores, as they were given."""

    softmax_scale: Any
    causal: Any
    window_size: Any
    softcap: Any

    def options(self) -> dict[str, Any]:
        """The same for the ops, with `causal` folded into the window."""
        return {
            "scale": scale_of("softmax_scale", self.softmax_scale),
            "causal": False,
            "window": window_of(self.window_size, self.causal),
            "softcap": number("softcap", self.softcap),
        }


class Lengths(NamedTuple):
    """The arguments that place packed sequences, as they were given."""

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    max_seqlen_q: Any
    max_seqlen_k: Any

    def options(self) -> dict[str, Any]:
        """The same for the op."""
        given = self._asdict()
        for name in ("max_seqlen_q", "max_seqlen_k"):
            given[name] = integer(name, given[name], 0)
        return given


def attend(
    qkv: tuple[Any, Any, Any],
    added: Added,
    scores: Scores,
    return_lse: bool,
    backend: str,
    lengths: Lengths | None = None,
    seqused: tuple[Any, Any] = (None, None),
) -> Any:
    """out, or (out, lse), of a batch, or of packed sequences where `lengths` are given.

    `seqused`: how many of each packed sequence's queries and keys are there; None: all.
    """
    q, k, v = qkv
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        **added._asdict(),
        **scores.options(),
        "return_lse": return_lse,
        "backend": backend,
    }
    if lengths is None:
        return value_residual_attention(**arguments)
    arguments |= lengths.options()
    if seqused[0] is None and seqused[1] is None:
        return value_residual_attention_varlen(**arguments)
    seqused_q, seqused_k = seqused
    named = {**arguments, "seqused_q": seqused_q, "seqused_k": seqused_k}
    dtensors.refuse("flash_attn_varlen_func with seqused_q or seqused_k", **named)
    _check(arguments)
    back = None
    for side, of_side, used in (("q", _QUERIES, seqused[0]), ("k", _KEYS, seqused[1])):
        if used is not None:
            order, ends = _used_first(side, arguments[side], arguments[f"cu_seqlens_{side}"], used)
            total = arguments[side].shape[0]
            # Neither changes a shape.
            if not explaining():
                arguments |= {x: _ordered(arguments[x], order, total) for x in of_side}
                arguments[f"cu_seqlens_{side}"] = ends
                back = order.argsort() if side == "q" else back
    result = value_residual_attention_varlen(**arguments)
    if back is None:
        return result
    # Rows after the last sequence, where those that are not used are, came back as zeros.
    return (result[0][back], result[1][:, back]) if return_lse else result[back]


_QUERIES = ("q", "exclusive", "out_gate")
_KEYS = ("k", "v", "v_first", "lambda_v", "lambda_first")
"""Arguments with a row for each query, or each key."""


def _check(arguments: dict[str, Any]) -> None:
    """Check the arguments as the op does, before their rows are put in another order."""
    given = {name: x for name, x in arguments.items() if name != "backend"}
    offsets = tuple(given.pop(name) for name in Lengths._fields)
    check_call(**given, packing=offsets, sinks=None, attn_bias=None, return_mixed_value=False)


def _used_first(side: str, x: Any, cu_seqlens: Any, seqused: Any) -> tuple[Tensor, Tensor]:
    """(the order of the rows of q or k that puts those in use first, their offsets)."""
    rows = packing(f"cu_seqlens_{side}", cu_seqlens, side, x)
    name, batch = f"seqused_{side}", rows.lengths.shape[0]
    check_ints(name, seqused, batch, x.device)
    if readable(seqused) and not bool(((seqused >= 0) & (seqused <= rows.lengths)).all()):
        raise ValueError(
            f"{name} must lie between 0 and the lengths {rows.lengths.tolist()}, "
            f"got {seqused.tolist()}"
        )
    there = rows.left >= 1
    if batch > 0:
        there = there & (rows.place < seqused[rows.sequence])
    ends = functional.pad(seqused.clamp(min=0).minimum(rows.lengths).cumsum(0), (1, 0))
    return (~there).int().argsort(stable=True), ends.int()


def _ordered(x: Any, order: Tensor, total: int) -> Any:
    """x in another order of its rows; what has none is unchanged."""
    rows = isinstance(x, Tensor) and x.dim() == 3 and x.shape[0] == total
    return x[order] if rows else x


def unpack(name: str, packed: Any, parts: int, rank: int) -> tuple[Tensor, ...]:
    """Views of the tensors stacked along the axis before the heads."""
    axes = f"{'(B, T' if rank == 5 else '(total_tokens'}, {parts}, heads, head_dim)"
    check_stacked(name, packed, rank, axes)
    if packed.shape[-3] != parts:
        raise ValueError(f"{name} must be {axes}, got shape {tuple(packed.shape)}")
    result: tuple[Tensor, ...] = packed.unbind(-3)
    return result


def check_stacked(name: str, packed: Any, rank: int, axes: str) -> None:
    """Check what ops would say of one of the tensors that `packed` holds."""
    check_tensor(name, packed, rank, axes)
    if packed.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {packed.dtype}")
