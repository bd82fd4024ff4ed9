"""Queries and new tokens packed one sequence after the other, in terms of the op's batches.

Queries become the last rows of a batch as long as the longest sequence: the op aligns the last
query of a sequence with its last key, so what stands before the first changes nothing. New tokens
become sequences of one token each, appended before the call that attends. Nothing here waits for a
GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from resformer_kernels._core.checks import check_cu_seqlens, check_tensor, integer


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
    end: int | None
    """Rows of all sequences, where they may be read."""


def packing(argument: str, cu_seqlens: Any, name: str, rows: Tensor) -> Packing:
    """Check `cu_seqlens`, which the caller calls `argument`, of the packed tensor called `name`."""
    offsets = check_cu_seqlens(
        cu_seqlens, name, rows, f"{name}'s {{}} tokens", argument=argument, sequences="batch"
    )
    batch = cu_seqlens.shape[0] - 1
    row = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
    after = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    # Offsets that were not read may be wrong, but lead nowhere else.
    sequence = after.clamp(max=max(batch - 1, 0))
    return Packing(
        sequence=sequence,
        place=row - cu_seqlens[sequence],
        left=cu_seqlens[(after + 1).clamp(max=batch)] - row,
        lengths=cu_seqlens[1:] - cu_seqlens[:-1],
        end=0 if batch == 0 else None if offsets is None else offsets[-1],
    )


class Queries(NamedTuple):
    """Packed queries as a batch."""

    batch: Tensor
    """(B, longest, Hq, D)."""
    slot: Tensor
    """(total_q,): the row of each query among B * longest, and one past them for a query after the
    last sequence."""

    def unpack(self, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(total_q, Hq, Dv) of out (B, longest, Hq, Dv), and (Hq, total_q) of lse (B, Hq, longest).

        Queries after the last sequence are zeros, with an LSE of -inf.
        """
        rows = functional.pad(out.flatten(0, 1), (0, 0, 0, 0, 0, 1))[self.slot]
        if lse is None:
            return rows, None
        lse = functional.pad(lse.transpose(1, 2).flatten(0, 1), (0, 0, 0, 1), value=-torch.inf)
        return rows, lse[self.slot].transpose(0, 1).contiguous()


def queries(q: Tensor, cu_seqlens_q: Any, max_seqlen_q: Any) -> Queries:
    """q (total_q, Hq, D) as a batch of sequences that end together."""
    packed = packing("cu_seqlens_q", cu_seqlens_q, "q", q)
    if max_seqlen_q is None:
        raise ValueError("max_seqlen_q must be given with cu_seqlens_q, got None")
    longest = integer("max_seqlen_q", max_seqlen_q, 0)
    batch = packed.lengths.shape[0]
    if packed.end is not None and batch > 0 and packed.lengths.max() > longest:
        raise ValueError(
            "max_seqlen_q must be at least the longest sequence of cu_seqlens_q, "
            f"{int(packed.lengths.max())}, got {longest}"
        )
    inside = (packed.left >= 1) & (packed.left <= longest)
    slot = torch.where(inside, (packed.sequence + 1) * longest - packed.left, batch * longest)
    rows = q.new_zeros((batch * longest + 1, *q.shape[1:])).index_put((slot,), q)
    return Queries(rows[:-1].unflatten(0, (batch, longest)), slot)


class NewTokens(NamedTuple):
    """Packed new tokens, of which at least one of k and v is given."""

    k: Tensor | None
    v: Tensor | None
    packed: Packing

    def append(self, q: Tensor, lengths: Tensor, block_table: Tensor | None) -> dict[str, Any]:
        """A call without queries that appends each token, as a sequence of its own, to those of
        `lengths` tokens. `q` is that of the call that attends."""
        packed = self.packed
        count = packed.place.shape[0] if packed.end is None else packed.end
        row = torch.arange(count, device=lengths.device)
        # A row after the last sequence repeats the last token: written twice, it is the same.
        row = torch.minimum(row, packed.lengths.sum() - 1).clamp(min=0)
        sequence = packed.sequence[row]
        at = torch.where(packed.left[row] >= 1, lengths[sequence] + packed.place[row], -1)
        return {
            "q": q.new_empty((count, 0, *q.shape[2:])),
            "k": None if self.k is None else self.k[row][:, None],
            "v": None if self.v is None else self.v[row][:, None],
            "cache_seqlens": at,
            # A row of a contiguous cache is a page as long as the cache.
            "block_table": sequence.int()[:, None]
            if block_table is None
            else block_table[sequence],
        }


def new_tokens(k: Any, v: Any, cu_seqlens_k_new: Any, batch: int) -> NewTokens:
    """k and v (total_new, Hkv, D) of `batch` sequences."""
    given = {name: x for name, x in (("k", k), ("v", v)) if x is not None}
    if not given:
        raise ValueError("cu_seqlens_k_new must be None where k and v are: nothing is appended")
    for name, x in given.items():
        check_tensor(name, x, 3, "(total_new, kv_heads, head_dim) with cu_seqlens_k_new")
    if len(given) == 2 and k.shape[0] != v.shape[0]:
        raise ValueError(f"v must have k's {k.shape[0]} new tokens, got shape {tuple(v.shape)}")
    name, like = next(iter(given.items()))
    packed = packing("cu_seqlens_k_new", cu_seqlens_k_new, name, like)
    if packed.lengths.shape[0] != batch:
        raise ValueError(
            f"cu_seqlens_k_new must have q's {batch} sequences and one entry more, "
            f"got {cu_seqlens_k_new.shape[0]} entries"
        )
    return NewTokens(k, v, packed)
