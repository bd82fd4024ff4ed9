"""Tiles of the Triton kernels of `attention_with_kvcache`, and splits of the keys (split-KV).

Plain arithmetic on shapes. Reading lengths would synchronise with the GPU, so the cache's capacity
decides here, and each program finds its own keys from the length that it reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_STAGE_BYTES = 32 * 1024
"""Bytes of K and V in a tile: with two or three programs per multiprocessor, as many in flight
cover the latency of memory."""

_SMALL_BYTES = 16 * 1024
"""Bytes of K and V in a tile that a thread loads ahead without more than 168 registers."""
_REGISTERS = 65536
"""Of a multiprocessor."""
_BUSY = 0.8
"""Tiles that are this share of the programs that the GPU holds at once are not split."""
_ENOUGH = 0.85
"""The fewest splits with this share of the best efficiency are taken."""
_MOST = 128
"""Splits."""
LEAST_BLOCKS = 4
"""Fewest tiles of keys of a split: fewer are not worth merging."""


class Tiles(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of its loop's pipeline. `ahead`: instead
    of a pipeline, the next tile is loaded into registers, with an eviction policy."""

    rows: int
    keys: int
    warps: int
    stages: int
    ahead: bool
    resident: int = 1
    """Programs that a multiprocessor holds at once. The compiler is held to it, by `registers`: the
    splits, and with them the bits, depend on no version of it."""

    @property
    def registers(self) -> int:
        """The most of a thread, for as many programs to be resident."""
        share = _REGISTERS // (self.resident * self.warps * 32)
        return min(255, share // 8 * 8)


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
        # Float8 codes occupy registers beside the numbers decoded from them.
        most = 32 if stored in (torch.float8_e4m3fn, torch.float8_e5m2) else 64
        keys = min(most, keys)
        # Half of the registers is 255 a thread and always enough, a third for small tiles alone.
        small = wanted == 16 and max(block_k, block_v) <= 128 and stored is not torch.int8
        third = small and keys * (block_k + block_v) * stored.itemsize <= _SMALL_BYTES
        return Tiles(wanted, keys, 4, 1, True, resident=3 if third else 2)
    return Tiles(min(64 if block_v > 128 else 128, wanted), min(64, keys), 8, 2, False)


def choose_splits(tiles: int, blocks: int, slots: int) -> int:
    """Number of splits of the keys.

    Args:
        tiles: programs without a split: sequences, KV heads and tiles of rows.
        blocks: the most tiles of keys that a program may have.
        slots: programs that the GPU holds at once.
    """
    if tiles == 0 or tiles >= _BUSY * slots:
        return 1
    most = max(1, min(_MOST, slots, blocks // LEAST_BLOCKS))

    def efficiency(splits: int) -> float:
        waves = tiles * splits / slots
        return waves / -(-tiles * splits // slots)

    best = max(efficiency(splits) for splits in range(1, most + 1))
    return next(n for n in range(1, most + 1) if efficiency(n) >= _ENOUGH * best)


def keys_in_reach(capacity: int, queries: int, window_left: int) -> int:
    """The most keys that the last `queries` positions of a sequence may see together."""
    return capacity if window_left < 0 else min(capacity, window_left + queries)
