"""How the Triton kernels of `attention_with_kvcache` cut their work: tiles, and splits of the keys.

Plain arithmetic on shapes. Lengths lie on the GPU and are not asked for: what is decided here is
decided by the cache's capacity, and each program finds its own keys from the length that it reads.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Of K and V in one stage of the pipeline: two programs of three stages fit a multiprocessor's
# shared memory, and what they have in flight covers the memory's latency.
_STAGE_BYTES = 32 * 1024
_STAGES = 3

_BUSY = 0.8
"""Tiles that keep this share of the multiprocessors busy are not split."""
_ENOUGH = 0.85
"""Of the best efficiency that any number of splits reaches: the fewest splits reach it."""
_MOST = 128
LEAST_BLOCKS = 4
"""Tiles of keys of a split: fewer are not worth merging."""

_H100 = 132
"""Multiprocessors, where there is no GPU to ask."""


class Tiles(NamedTuple):
    """Rows and keys of a tile, warps of a program, and stages of its loop's pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_tiles(rows: int, block_k: int, block_v: int, dtype: torch.dtype, stored: int) -> Tiles:
    """The tiles of a call.

    Args:
        rows: queries times query heads of a KV head.
        block_k: head_dim of K, padded to a power of two.
        block_v: the same of V.
        dtype: of q.
        stored: bytes of an element of the cache.
    """
    precise = dtype is torch.float32
    most = 32 if precise else 64
    tile_rows = min(most, max(16, 1 << (rows - 1).bit_length()))
    room = _STAGE_BYTES // ((block_k + block_v) * stored)
    keys = min(32 if precise else 128, max(16, 1 << (room.bit_length() - 1)))
    if tile_rows == most:
        # As many scores as registers hold beside the sums of a tile's rows.
        keys = min(keys, 64)
    return Tiles(tile_rows, keys, 8 if precise else 4, 2 if precise else _STAGES)


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


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return _H100
    return torch.cuda.get_device_properties(device).multi_processor_count
