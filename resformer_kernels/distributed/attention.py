"""`value_residual_attention` on a sequence that is split across ranks.

By the kernels of this package it is a ring. Backends that serve whole calls alone (the reference,
torch's SDPA, FlashAttention) get the keys and values of every rank instead, in the order of
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.gradient import seeing
from resformer_kernels._core.op import NATIVE, TRITON
from resformer_kernels._core.select import select
from resformer_kernels.attention import epilogue_op
from resformer_kernels.attention.record import FIXED, PACKED, AttentionCall
from resformer_kernels.attention.shared import mixed
from resformer_kernels.distributed import ring_op
from resformer_kernels.distributed.ring_op import RingCall
from resformer_kernels.distributed.split import Split
from resformer_kernels.distributed.steps import step

_NAMESPACES = {"native": NATIVE, "triton": TRITON}
_FIRST = "v_first of every rank"


def serve(
    split: Split, backend: str, backends: Sequence[Any], call: AttentionCall
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, V' or None) of this rank's queries over the whole sequence."""
    _check(split, call)
    plain = call._replace(exclusive=None, exclusive_value=0.0, out_gate=None)
    asked = plain._replace(return_mixed_value=call.return_mixed_value or call.excludes)
    if backend == "auto":
        backends = across_ranks(backends)
    chosen = select(FIXED, backend, backends, plain)
    namespace = _NAMESPACES.get(chosen.NAME)
    if namespace is None:
        y, lse, value = _over_gathered(split, chosen, asked)
    else:
        y, lse, value = _by_ring(split, namespace, asked)
    if not call.plain:
        finishing = epilogue_op.epilogue_of(call, y, value)
        y = epilogue_op.run(namespace or NATIVE, finishing)
    if not call.return_mixed_value:
        return y, lse, None
    return y, lse, value.clone() if value is call.value else value


def across_ranks(backends: Sequence[Any]) -> list[Any]:
    """The backends that `auto` takes, in order: ours first, wherever one process would take
    another's, for they alone need no gathering."""
    ours = [x for x in backends if x.NAME in _NAMESPACES]
    return [*ours, *(x for x in backends if x.NAME in ("sdpa", "reference"))]


def _check(split: Split, call: AttentionCall) -> None:
    if call.packed:
        raise RuntimeError(
            f"{PACKED} cannot run under context_parallel: pass sequences of one length, (B, T, "
            f"heads, head_dim), to {FIXED}"
        )
    if call.attn_bias is not None:
        raise RuntimeError(
            f"attn_bias cannot be used under context_parallel, got {tuple(call.attn_bias.shape)}: "
            "its keys lie on other ranks; causal, window, softcap and sinks can"
        )
    split.check("q", call.q.shape[1])
    split.check("k", call.k.shape[1])


def _by_ring(
    split: Split, namespace: str, call: AttentionCall
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    v, v_first = call.v, call.v_first
    whole = None
    if v is None and v_first is not None:
        whole, v_first = _first_values(split, v_first), None
    ring = RingCall(
        split=split.name,
        q=call.q,
        k=call.k,
        v=v,
        v_first=v_first,
        lambda_v=call.lambda_v,
        lambda_first=call.lambda_first,
        sinks=call.sinks,
        whole=whole,
        lambda_v_value=call.lambda_v_value,
        lambda_first_value=call.lambda_first_value,
        window_left=call.window_left,
        window_right=call.window_right,
        scale=call.scale,
        softcap=call.softcap,
        return_lse=call.return_lse,
        return_mixed_value=call.return_mixed_value,
    )
    y, lse, value = ring_op.run(namespace, ring)
    if whole is not None:
        value = call.value
    return y, lse if call.return_lse else None, value if call.return_mixed_value else None


def _over_gathered(
    split: Split, backend: Any, call: AttentionCall
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """By a backend that serves whole calls: one for each of this rank's pieces of queries."""
    value = mixed(call)
    moved = (("k", call.k), ("v", value))
    keys, values = (split.in_order(_Gathered.apply(split, name, x, None)) for name, x in moved)
    everything = split.deal.everything
    found = []
    for index, piece in enumerate(split.mine):
        seen = step(piece, everything, call.window_left, call.window_right)
        if seen is None:
            continue
        q = call.q[:, split.deal.place(split.ranks.rank, index)]
        part = call._replace(
            q=q,
            k=keys[:, seen.keys],
            v=values[:, seen.keys],
            v_first=None,
            lambda_v=None,
            lambda_first=None,
            lambda_v_value=1.0,
            lambda_first_value=1.0,
            max_seqlen_q=piece.length,
            max_seqlen_k=seen.keys.stop - seen.keys.start,
            window_left=seen.left,
            window_right=seen.right,
            return_mixed_value=False,
        )
        found.append(backend.run(part))
    if not found:
        # The other ranks' gradients pass through this one's backward too.
        out = seeing(
            call.q.new_zeros((*call.q.shape[:-1], value.shape[-1])), (call.q, keys, values)
        )
        lse = out.new_zeros((out.shape[0], out.shape[2], 0)) if call.return_lse else None
        return out, lse, value if call.return_mixed_value else None
    out = torch.cat([x[0] for x in found], 1)
    lse = torch.cat([x[1] for x in found], -1) if call.return_lse else None
    return out, lse, value if call.return_mixed_value else None


class _Gathered(torch.autograd.Function):
    """apply(split, name, x, before) -> x of every rank, (ranks, B, longest T, ...), or `before`,
    which was gathered of the same values; backward sums, and leaves each rank its part."""

    @staticmethod
    def forward(ctx: Any, split: Split, name: str, x: Tensor, before: Tensor | None) -> Tensor:
        ctx.split, ctx.name, ctx.length = split, name, x.shape[1]
        return split.padded(x, name) if before is None else before.view_as(before)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
        found = ctx.split.ranks.scatter_sum(f"d{ctx.name}", grad)
        return None, None, found[:, : ctx.length], None


def _first_values(split: Split, v_first: Tensor) -> Tensor:
    """V_1 of every rank, gathered once for all layers that are given the same tensor.

    A layer that checkpointing runs again gets a copy of the tensor, on the same memory: what was
    gathered serves it too, with a gradient of its own.
    """
    if torch.compiler.is_compiling():
        whole: Tensor = _Gathered.apply(split, "v_first", v_first, None)
        return whole
    version = 0 if v_first.is_inference() else v_first._version
    key = (v_first.data_ptr(), v_first.shape, v_first.stride(), v_first.dtype, version)
    kept = split.memo.get(_FIRST)
    if kept is None or kept[0] != key:
        whole = _Gathered.apply(split, "v_first", v_first, None)
        # The source is kept, so that its memory holds no other tensor meanwhile.
        split.memo[_FIRST] = (key, v_first, whole)
        return whole
    _, source, whole = kept
    wanted = torch.is_grad_enabled() and v_first.requires_grad
    if source is v_first and whole.requires_grad == wanted:
        return whole
    again: Tensor = _Gathered.apply(split, "v_first", v_first, whole.detach())
    return again
