"""Tokens of a cache in memory: the records that kernels read and write it by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.specialise import Unit
from resformer_kernels._triton.views import View


class Matrix(NamedTuple):
    """key_mask, a row per sequence, by strides in elements, with one byte per key. Without a
    pointer every key is open."""

    pointer: Tensor | None
    row: int
    column: Unit


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
    return Matrix(None, 0, 0) if mask is None else Matrix(mask.view(torch.uint8), *mask.stride())


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
