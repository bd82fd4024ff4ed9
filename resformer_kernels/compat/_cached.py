"""What the functions of every version of FlashAttention share: attention over a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core import dtensors
from resformer_kernels._core.checks import (
    check_cu_seqlens,
    check_device,
    check_flag,
    check_tensor,
    integer,
    readable,
)
from resformer_kernels._core.gradient import without_gradient
from resformer_kernels._core.op import refuse_vmap
from resformer_kernels._core.select import explaining
from resformer_kernels.compat._arguments import check_ints
from resformer_kernels.compat._flash import Added, Lengths, Scores
from resformer_kernels.compat._rotary import Rotary, check_rotary, rotated
from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.kvcache.packed import Packing, packing
from resformer_kernels.kvcache.record import ATTEND
from resformer_kernels.mix.api import mix_values

MIXED = {
    "values[0]": "v",
    "values[1]": "v_first",
    "coefficients[0]": "lambda_v",
    "coefficients[1]": "lambda_first",
}
"""The drop-ins' names of what `mix_values` is given."""

_NO_GRADIENT = (
    f"attention over a cache ({ATTEND}) has no gradient: train with value_residual_attention"
)


class Cache(NamedTuple):
    """The arguments that describe a cache, as they were given."""

    k_cache: Any
    v_cache: Any
    cache_seqlens: Any
    cache_batch_idx: Any = None
    cache_leftpad: Any = None
    block_table: Any = None


class Packed(NamedTuple):
    """The arguments of packed queries and new tokens, as they were given; None: batches."""

    cu_seqlens_q: Any = None
    max_seqlen_q: Any = None
    cu_seqlens_k_new: Any = None

    def batch(self, q: Any) -> int:
        """Number of sequences of the queries, which are checked."""
        if self.cu_seqlens_q is None:
            check_tensor("q", q, 4, "(batch, time, heads, head_dim)")
            return int(q.shape[0])
        check_tensor("q", q, 3, "(total_q, heads, head_dim) with cu_seqlens_q")
        check_tensor("cu_seqlens_q", self.cu_seqlens_q, 1, "(batch + 1,), int32")
        return int(self.cu_seqlens_q.shape[0]) - 1

    @property
    def new_axes(self) -> tuple[int, str]:
        """The rank of new tokens, and their axes in words."""
        if self.cu_seqlens_k_new is None:
            return 4, "(batch, new_tokens, kv_heads, head_dim) or None"
        return 3, "(total_new, kv_heads, head_dim) or None, with cu_seqlens_k_new"

    def of(self, argument: str, name: str, x: Tensor) -> Packing | None:
        """How x, which is called `name`, is packed by the offsets called `argument`."""
        offsets = getattr(self, argument)
        return None if offsets is None else packing(argument, offsets, name, x)


class Run(NamedTuple):
    """How a call runs, as it was given."""

    num_splits: Any
    return_lse: Any
    backend: str


def attend(
    q: Any,
    new: tuple[Any, Any],
    cache: Cache,
    added: Added,
    scores: Scores,
    rotary: Rotary,
    packed: Packed,
    how: Run,
) -> Any:
    """Append k and v, which are `new`, the values mixed with v_first, then attend: out, or
    (out, lse). Differentiating either raises."""
    k, v = new
    turned = {"rotary_cos": rotary.cos, "rotary_sin": rotary.sin, "rotary_seqlens": rotary.seqlens}
    others = {**cache._asdict(), **added._asdict(), **packed._asdict(), **turned}
    dtensors.refuse("flash_attn_with_kvcache", q=q, k=k, v=v, **others)
    options = _check(q, new, cache, added, scores, rotary, packed, how)
    stepping = options["window"] != (-1, -1)

    def run(
        q: Any,
        k: Any,
        v: Any,
        v_first: Any,
        lambda_v: Any,
        lambda_first: Any,
        exclusive: Any,
        exclusive_eps: Any,
        out_gate: Any,
        k_cache: Any,
        v_cache: Any,
    ) -> Any:
        values = v_first if v is None else v
        # Neither changes a shape or a dtype.
        if not explaining():
            if rotary.given:
                first = _first(rotary, options["cache_seqlens"], packed.batch(q), q.device)
                q = rotated(rotary, q, first, packed.of("cu_seqlens_q", "q", q), stepping)
                k = rotated(rotary, k, first, packed.of("cu_seqlens_k_new", "k", k), True)
            if v is not None and v_first is not None:
                values = mix_values((v, v_first), (lambda_v, lambda_first))
        finish = {"exclusive": exclusive, "exclusive_eps": exclusive_eps, "out_gate": out_gate}
        result = attention_with_kvcache(q, k_cache, v_cache, k, values, **finish, **options)
        return result if how.return_lse else (result,)

    leaves = (q, k, v, *added, cache.k_cache, cache.v_cache)
    refuse_vmap(ATTEND, leaves)
    result = without_gradient(ATTEND, _NO_GRADIENT, run, leaves)
    return result if how.return_lse else result[0]


def attend_pages(
    qkv: tuple[Any, Any, Any],
    added: Added,
    scores: Scores,
    return_lse: bool,
    backend: str,
    lengths: Lengths,
    block_table: Any,
) -> Any:
    """`_flash.attend` of packed queries over pages of keys and values."""
    q, k, v = qkv
    if v is None:
        v = added.v_first
    elif added.v_first is not None:
        raise NotImplementedError(
            "v_first must be None with block_table, unless v is: pages hold mixed values, which "
            "flash_attn_with_kvcache appends"
        )
    given = lengths.options()
    cu_seqlens_q, cu_seqlens_k = lengths.cu_seqlens_q, lengths.cu_seqlens_k
    check_tensor("k", k, 4, "(pages, page_size, kv_heads, head_dim) with block_table")
    check_cu_seqlens(cu_seqlens_k, "k", k, None, argument="cu_seqlens_k", sequences="batch")
    packed = Packed(cu_seqlens_q, given["max_seqlen_q"])
    batch = packed.batch(q)
    if cu_seqlens_k.shape[0] != batch + 1:
        raise ValueError(
            f"cu_seqlens_k must have cu_seqlens_q's {batch + 1} entries, "
            f"got {cu_seqlens_k.shape[0]}"
        )
    return attend(
        q,
        (None, None),
        Cache(k, v, cu_seqlens_k[1:] - cu_seqlens_k[:-1], block_table=block_table),
        added._replace(v_first=None, lambda_v=0.5, lambda_first=0.5),
        scores,
        Rotary(None, None, True),
        packed,
        Run(0, return_lse, backend),
    )


def _check(
    q: Any,
    new: tuple[Any, Any],
    cache: Cache,
    added: Added,
    scores: Scores,
    rotary: Rotary,
    packed: Packed,
    how: Run,
) -> dict[str, Any]:
    """Check what the op does not; return its keywords."""
    k, v = new
    batch = packed.batch(q)
    check_tensor("k_cache", cache.k_cache, 4, "(batch, time, kv_heads, head_dim)")
    table = _table(cache, batch, q.device)
    pages = 1 if cache.block_table is None else cache.block_table.shape[1]
    capacity = cache.k_cache.shape[1] * pages
    lengths = cache.cache_seqlens
    if lengths is None:
        if not (k is None and v is None and added.v_first is None):
            raise ValueError("cache_seqlens must be given where tokens are appended, got None")
        lengths = capacity
    elif isinstance(lengths, Tensor) and lengths.dim() > 0:
        check_ints("cache_seqlens", lengths, batch, q.device)
    else:
        lengths = integer("cache_seqlens", lengths)
    for name, x in (("k", k), ("v", v), ("v_first", added.v_first)):
        if x is not None:
            check_tensor(name, x, *packed.new_axes)
        if x is not None and k is None:
            raise ValueError(f"{name} must be None where k is: values are appended with their keys")
    check_rotary(rotary, q, k, capacity)
    if rotary.seqlens is not None:
        check_ints("rotary_seqlens", rotary.seqlens, batch, q.device)
    key_mask = None
    if cache.cache_leftpad is not None:
        check_ints("cache_leftpad", cache.cache_leftpad, batch, q.device)
        key_mask = torch.arange(capacity, device=q.device) >= cache.cache_leftpad[:, None]
    check_flag("return_softmax_lse", how.return_lse)
    return {
        **scores.options(),
        **packed._asdict(),
        "cache_seqlens": lengths,
        "block_table": table,
        "key_mask": key_mask,
        "num_splits": integer("num_splits", how.num_splits),
        "return_lse": how.return_lse,
        "backend": how.backend,
    }


def _table(cache: Cache, batch: int, device: torch.device) -> Any:
    """The op's block_table. A cache row is a page as long as the cache."""
    table, rows = cache.block_table, cache.cache_batch_idx
    if table is not None:
        check_tensor("block_table", table, 2, "(batch, pages), int32")
    if rows is None:
        return table
    check_ints("cache_batch_idx", rows, batch, device)
    if table is None:
        return rows[:, None]
    check_device("block_table", table, device)
    if readable(rows) and not bool(((rows >= 0) & (rows < table.shape[0])).all()):
        raise ValueError(
            f"cache_batch_idx must name rows 0 to {table.shape[0] - 1} of block_table, "
            f"got {rows.tolist()}"
        )
    return table[rows]


def _first(rotary: Rotary, lengths: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """(B,), the position of each sequence's first new token."""
    first = lengths if rotary.seqlens is None else rotary.seqlens
    return first if isinstance(first, Tensor) else torch.full((batch,), first, device=device)
