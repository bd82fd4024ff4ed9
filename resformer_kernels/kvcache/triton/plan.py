"""How the Triton kernels of `attention_with_kvcache` cut their work: tiles, and splits of the keys.

Plain arithmetic on shapes. Lengths lie on the GPU and are not asked for: what is decided here is
decided by the cache's capacity, and each program finds its own keys from the length that it reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Of K and V in one tile: what the two or three programs of a multiprocessor then have in flight
# covers the memory's latency.
_STAGE_BYTES = 32 * 1024

_BUSY = 0.8
"""Tiles that keep this share of the multiprocessors busy are not split."""
_ENOUGH = 0.85
"""Of the best efficiency that any number of splits reaches: the fewest splits reach it."""
_MOST = 128
LEAST_BLOCKS = 4
"""Tiles of keys of a split: fewer are not worth merging."""


class Tiles(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of its loop's pipeline, or `ahead`: the
    next tile is loaded into registers, with hints to the second-level cache."""

    rows: int
    keys: int
    warps: int
    stages: int
    ahead: bool


def choose_tiles(
    rows: int, block_k: int, block_v: int, dtype: torch.dtype, stored: torch.dtype
) -> Tiles:
    """The tiles of a call.

    Args:
        rows: queries times query heads of a KV head.
        block_k: head_dim of K, padded to a power of two.
        block_v: the same of V.
        dtype: of q.
        stored: the cache's.
    """
    room = _STAGE_BYTES // ((block_k + block_v) * stored.itemsize)
    keys = max(16, 1 << (room.bit_length() - 1))
    wanted = max(16, 1 << (rows - 1).bit_length())
    if dtype is torch.float32:
        return Tiles(min(32, wanted), min(32, keys), 8, 2, wanted <= 16)
    if wanted <= 32:
        # What float8 is decoded from takes registers beside the numbers that it becomes.
        most = 32 if stored in (torch.float8_e4m3fn, torch.float8_e5m2) else 64
        return Tiles(wanted, min(most, keys), 4, 1, True)
    return Tiles(min(64 if block_v > 128 else 128, wanted), min(64, keys), 8, 2, False)


def choose_splits(tiles: int, blocks: int, processors: int) -> int:
    """Into how many parts the keys are cut.

    Args:
        tiles: programs without a split: sequences, KV heads and tiles of rows.
        blocks: the most tiles of keys that a program may have.
        processors: multiprocessors of the GPU.
    """
    if tiles == 0 or tiles >= _BUSY * processors:
        return 1
    most = max(1, min(_MOST, processors, blocks // LEAST_BLOCKS))

    def efficiency(splits: int) -> float:
        waves = tiles * splits / processors
        return waves / -(-tiles * splits // processors)

    best = max(efficiency(splits) for splits in range(1, most + 1))
    return next(n for n in range(1, most + 1) if efficiency(n) >= _ENOUGH * best)


def keys_in_reach(capacity: int, queries: int, window_left: int) -> int:
    """The most keys that some of `queries` queries, the last positions of a sequence, may see."""
    return capacity if window_left < 0 else min(capacity, window_left + queries)
