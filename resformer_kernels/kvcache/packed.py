"""Queries and new tokens packed one sequence after the other: their checks, and the reference's
view of them. Nothing here waits for a GPU.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from resformer_kernels._core.checks import check_cu_seqlens, check_tensor, integer
from resformer_kernels.kvcache.record import KVCacheCall


class Packing(NamedTuple):
    """The rows of a tensor whose first axis holds one sequence after the other."""

    sequence: Tensor
    """(rows,) int64: the sequence of each row; any for a row after the last sequence."""
    place: Tensor
    """(rows,) int32: rows of its sequence before it."""
    left: Tensor
    """(rows,) int32: rows of its sequence from it on; below 1 after the last sequence."""
    lengths: Tensor
    """(batch,) int32."""


def packing(argument: str, cu_seqlens: Any, name: str, rows: Tensor) -> Packing:
    """Check `cu_seqlens`, which the caller calls `argument`, of the packed tensor called `name`."""
    _check_offsets(argument, cu_seqlens, name, rows)
    return rows_of(cu_seqlens, rows.shape[0])


def _check_offsets(argument: str, offsets: Any, name: str, rows: Tensor) -> list[int] | None:
    return check_cu_seqlens(
        offsets, name, rows, f"{name}'s {{}} tokens", argument=argument, sequences="batch"
    )


def rows_of(cu_seqlens: Tensor, rows: int) -> Packing:
    """How `rows` rows are packed by offsets (batch + 1,), which were checked."""
    batch = cu_seqlens.shape[0] - 1
    row = torch.arange(rows, device=cu_seqlens.device, dtype=torch.int32)
    after = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    # Offsets that were not read may be wrong, but lead nowhere else.
    sequence = after.clamp(max=max(batch - 1, 0))
    return Packing(
        sequence=sequence,
        place=row - cu_seqlens[sequence],
        left=cu_seqlens[(after + 1).clamp(max=batch)] - row,
        lengths=cu_seqlens.diff(),
    )


def check_queries(q: Tensor, cu_seqlens_q: Any, max_seqlen_q: Any) -> int:
    """Check the offsets of q (total_q, Hq, D); returns max_seqlen_q."""
    offsets = _check_offsets("cu_seqlens_q", cu_seqlens_q, "q", q)
    if max_seqlen_q is None:
        raise ValueError("max_seqlen_q must be given with cu_seqlens_q, got None")
    most = integer("max_seqlen_q", max_seqlen_q, 0)
    longest = max(b - a for a, b in pairwise((0, *offsets))) if offsets else 0
    if longest > most:
        raise ValueError(
            "max_seqlen_q must be at least the longest sequence of cu_seqlens_q, "
            f"{longest}, got {most}"
        )
    return most


def check_new_tokens(k: Any, v: Any, cu_seqlens_k_new: Any, batch: int) -> None:
    """Check k and v (total_new, Hkv, D) of `batch` sequences, apart from their heads."""
    given = {name: x for name, x in (("k", k), ("v", v)) if x is not None}
    if not given:
        raise ValueError("cu_seqlens_k_new must be None where k and v are: nothing is appended")
    for name, x in given.items():
        check_tensor(name, x, 3, "(total_new, kv_heads, head_dim) with cu_seqlens_k_new")
    if len(given) == 2 and k.shape[0] != v.shape[0]:
        raise ValueError(f"v must have k's {k.shape[0]} new tokens, got shape {tuple(v.shape)}")
    name, like = next(iter(given.items()))
    _check_offsets("cu_seqlens_k_new", cu_seqlens_k_new, name, like)
    if cu_seqlens_k_new.shape[0] != batch + 1:
        raise ValueError(
            f"cu_seqlens_k_new must have q's {batch} sequences and one entry more, "
            f"got {cu_seqlens_k_new.shape[0]} entries"
        )


class Queries(NamedTuple):
    """Packed queries as a batch whose sequences end together."""

    call: KVCacheCall
    """The call with q (B, longest, Hq, D), and exclusive and out_gate likewise."""
    slot: Tensor
    """(total_q,): the row of each query among B * longest, and one past them for a query after the
    last sequence."""

    def unpack(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """(1, total_q, Hq, Dv) of out (B, longest, Hq, Dv), and (1, Hq, total_q) of lse (B, Hq,
        longest). Queries after the last sequence are zeros, with an LSE of -inf.
        """
        rows = functional.pad(out.flatten(0, 1), (0, 0, 0, 0, 0, 1))[self.slot]
        lse = functional.pad(lse.transpose(1, 2).flatten(0, 1), (0, 0, 0, 1), value=-torch.inf)
        return rows[None], lse[self.slot].transpose(0, 1).contiguous()[None]


def as_batch(call: KVCacheCall) -> Queries:
    """The packed queries of a call. The op aligns the last query of a sequence with its last key,
    so what stands before the first changes nothing."""
    assert call.cu_seqlens_q is not None
    longest, batch, total = call.max_seqlen_q, call.sequences, call.q.shape[1]
    packed = rows_of(call.cu_seqlens_q, total)
    inside = (packed.left >= 1) & (packed.left <= longest)
    slot = torch.where(inside, (packed.sequence + 1) * longest - packed.left, batch * longest)

    def placed(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x[0].expand(total, *x.shape[2:])
        rows = x.new_zeros((batch * longest + 1, *x.shape[1:])).index_put((slot,), x)
        return rows[:-1].unflatten(0, (batch, longest))

    q = placed(call.q)
    assert q is not None
    exclusive, gate = placed(call.exclusive), placed(call.out_gate)
    batched = call._replace(q=q, exclusive=exclusive, out_gate=gate, cu_seqlens_q=None)
    return Queries(batched, slot)
