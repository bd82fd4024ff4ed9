"""Tokens of a cache in memory: the records that kernels read and write it by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.specialise import Unit
from resformer_kernels._triton.views import View
from resformer_kernels.kvcache.triton.codes import PLAIN


class Matrix(NamedTuple):
    """key_mask, a row of `columns` keys per sequence, by strides in elements, with one byte per
    key. Without a pointer every key is open."""

    pointer: Tensor | None
    row: int
    column: Unit
    columns: int


class Pool(NamedTuple):
    """The pages of keys or of values: block_table by strides in elements, without which the cache
    is contiguous."""

    table: Tensor | None
    row: int
    column: Unit
    pages: int
    page_size: int


class Side(NamedTuple):
    """Keys or values of a cache, and how kernels load them."""

    pool: Pool
    codes: View
    """(row or page, token, KV head, channel)."""
    scales: View
    """One per token and KV head; no pointer where STORED is PLAIN."""
    WIDTH: Any
    """Channels."""
    BLOCK: Any
    """WIDTH, padded."""
    STORED: Any
    """A kind of codes.py."""
    LARGEST: Any
    """The largest code; 0 where STORED is PLAIN."""
    POLICY: Any = tl.constexpr("")
    """Eviction policy of loads."""


class Cache(NamedTuple):
    """Keys, values, and where attention finds them."""

    k: Side
    v: Side
    mask: Matrix
    OWN: Any
    """Whether values have a block table of their own."""


class Place(NamedTuple):
    """Indices of tokens on the first two axes of a cache, valid where `inside`."""

    row: Any
    token: Any
    inside: Any


def matrix_of(mask: Tensor | None) -> Matrix:
    """key_mask as kernels take it."""
    if mask is None:
        return Matrix(None, 0, 0, 0)
    row, column = mask.stride()
    return Matrix(mask.view(torch.uint8), row, column, mask.shape[1])


def pool_of(table: Tensor | None, cache: Tensor) -> Pool:
    """The pages of a cache, by its block table."""
    steps = (0, 0) if table is None else table.stride()
    return Pool(table, *steps, *cache.shape[:2])


@triton.jit
def place_of(pool, sequence, keys, inside):
    """The place of keys of a sequence; not inside where their page does not exist."""
    if pool.table is None:
        place = Place(sequence, keys, inside)
    else:
        # The interpreter leaves an int times a constant a constant, which has no `to`.
        column = tl.cast(keys // pool.page_size, tl.int64) * pool.column
        at = tl.cast(sequence, tl.int64) * pool.row + column
        page = tl.load(pool.table + at, mask=inside, other=0)
        inside = inside & (page >= 0) & (page < pool.pages)
        place = Place(page, keys % pool.page_size, inside)
    return place


@triton.jit
def rows_of(view, place):
    """Offsets of the place in a cache's codes or scales, of KV head 0."""
    return place.row.to(tl.int64) * view.batch + place.token.to(tl.int64) * view.time


@triton.jit
def is_open(mask, sequence, keys, inside):
    """Whether keys of a sequence are inside, and open in key_mask."""
    if mask.pointer is not None:
        at = tl.cast(sequence, tl.int64) * mask.row + keys.to(tl.int64) * mask.column
        known = inside & (keys < mask.columns)
        inside = known & (tl.load(mask.pointer + at, mask=known, other=0) != 0)
    return inside


@triton.jit
def load_codes(side, head, place):
    """The keys or values of one head; zeros where not inside."""
    columns = tl.arange(0, side.BLOCK)
    base = side.codes.pointer + tl.cast(head, tl.int64) * side.codes.head
    mask = place.inside[:, None]
    if side.WIDTH != side.BLOCK:
        mask = mask & (columns < side.WIDTH)[None, :]
    # (tokens, BLOCK)
    at = base + rows_of(side.codes, place)[:, None] + columns[None, :]
    return tl.load(at, mask=mask, other=0, eviction_policy=side.POLICY)


@triton.jit
def load_scales(side, head, place):
    """The scales of the codes that `load_codes` loads; any numbers where STORED is PLAIN."""
    if side.STORED == PLAIN:
        scales = place.token
    else:
        base = side.scales.pointer + tl.cast(head, tl.int64) * side.scales.head
        scales = tl.load(base + rows_of(side.scales, place), mask=place.inside, other=0.0)
    return scales
