"""transformers' continuous batching (`generate_batch`): one V for all layers of an SVFormer.

An SVFormer's block has a page of keys for each layer and one page of values: (L + 1) / 2L of the
bytes, with every implementation of attention. transformers keeps the blocks, this module their
layout.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching import cache as paged_cache
from transformers.generation.continuous_batching.cache_allocators import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    CachePool,
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.utils import find_num_key_value_heads

from resformer_kernels.integrations.transformers.config import SVFORMER


def value_owners(config: Any, layers: list[int]) -> dict[int, int]:
    """For each of `layers` of an SVFormer the layer whose values it keeps; else an empty dict."""
    if getattr(config, "value_residual", None) != SVFORMER:
        return {}
    return {i: 0 if i in config.value_residual_layers else i for i in layers}


class FullAllocator(FullAttentionCacheAllocator):
    """Pages of half the size, of keys or of values, for layers that keep all tokens.

    Models other than SVFormers are kept as transformers keeps them.
    """

    last_writes = False
    """Whether shared values are written by the last layer that has them, not by the first."""

    step: tuple[Tensor, dict[Any, Any]] | None = None
    """The rows read in the current step, and what its layers planned."""
    _kv_page_views: dict[int, tuple[Tensor, Tensor]]

    def __init__(self, *, config: Any, layer_indices: list[int], **given: Any) -> None:
        super().__init__(config=config, layer_indices=layer_indices, **given)
        self.owners = value_owners(config, layer_indices)
        if not self.owners:
            return
        layers = self.owners.items() if self.last_writes else reversed(self.owners.items())
        self._writers = {owner: layer for layer, owner in layers}
        kept = list(dict.fromkeys(self.owners.values()))
        self.rows_per_token = 1
        self._before_cache_tensor_init(
            self.index,
            [*layer_indices, *kept],
            self.tokens_per_page,
            self.bytes_per_page // 2,
            given["allow_block_sharing"],
        )
        self.layer_indices = layer_indices

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: CachePool
    ) -> None:
        """Lay out an SVFormer's blocks: keys of every layer, then the values that are kept.

        [ L0 KEYS | L1 KEYS | ... | VALUES | L0 KEYS | L1 KEYS | ... | VALUES | ... ]
        [ ------------ BLOCK 0 ----------- | ----------- BLOCK 1 ------------ | ... ]
        """
        if not self.owners:
            super().register_cache_tensor(bytes_per_sector, non_trash_bytes, cache_tensor, pool)
            # A step has one plan, so all layers have as many pages as the last one.
            count = min(keys.shape[0] for keys, _ in self._kv_page_views.values())
            for i, (k, v) in self._kv_page_views.items():
                self._kv_page_views[i] = k[:count], v[:count]
            return
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        row = self.num_key_value_heads, self.head_dim
        rows = cache_tensor.view(self.cache_dtype).view(-1, *row)
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, rows, pool)
        page = self.tokens_per_page
        # A page of every view is found by the block's first one, so that all have one block table.
        count = rows.shape[0] // page - self.pages_per_block + 1
        views = [rows[i * page :][: count * page] for i in range(self.pages_per_block)]
        keys = dict(zip(self.layer_indices, views, strict=False))
        kept = dict.fromkeys(self.owners.values())
        values = dict(zip(kept, views[len(keys) :], strict=True))
        self._kv_token_views = {i: (keys[i], values[self.owners[i]]) for i in keys}
        self._kv_page_views = {
            i: (k.view(-1, page, *row), v.view(-1, page, *row))
            for i, (k, v) in self._kv_token_views.items()
        }

    def appends_values(self, layer: int) -> bool:
        """Whether the layer writes values: one of those that share them does."""
        return not self.owners or layer == self._writers[self.owners[layer]]


class SlidingAllocator(FullAllocator, SlidingAttentionCacheAllocator):
    """The same for layers that keep a ring of the last tokens."""

    last_writes = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        read_index: Tensor,
        write_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Read the window and put the new tokens behind it, then overwrite the ring.

        New values overwrite what slides out, which every layer reads: the last one writes them.

        Args:
            key_states: (total, Hkv, D), those of the new tokens; value_states likewise.
            read_index: rows of the window and the new tokens of all requests; the latter are
                `sentinel_index`. Empty where no request has a past.
            write_index: (total,) rows of the new tokens.

        Returns:
            Keys and values, (rows read, Hkv, D).
        """
        if not self.owners:
            found: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, layer_idx, read_index, write_index
            )
            return found
        keys, values = self._kv_token_views[layer_idx]
        seen = key_states, value_states
        if read_index.numel():
            fresh = read_index == self.sentinel_index
            seen = keys.index_select(0, read_index), values.index_select(0, read_index)
            for past, new in zip(seen, (key_states, value_states), strict=True):
                past.masked_scatter_(fresh[:, None, None], new)
        keys.index_copy_(0, write_index, key_states)
        if self.appends_values(layer_idx):
            values.index_copy_(0, write_index, value_states)
        return seen


def register(implementation: str) -> None:
    """Let continuous batching take `implementation`, and keep an SVFormer's values once.

    Allocators have a table. There is no hook for the rest: the choice of an implementation, which
    refuses what it does not know, and the planned memory, which would hold masks that are never
    made, are wrapped once.
    """
    paged_cache.ATTN_TYPE_TO_ALLOCATOR[FULL_ATTENTION] = FullAllocator
    paged_cache.ATTN_TYPE_TO_ALLOCATOR[SLIDING_ATTENTION] = SlidingAllocator
    switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
    if getattr(switch, "_takes", None) == implementation:
        return

    @functools.wraps(switch)
    def switched(self: Any, model: Any, auto_switch_to_flash: bool = True) -> None:
        if model.config._attn_implementation != implementation:
            switch(self, model, auto_switch_to_flash)

    switched._takes = implementation  # type: ignore[attr-defined]
    ContinuousBatchingManager.switch_to_cb_friendly_attn = switched

    plan = paged_cache.PagedAttentionMemoryHandler.__init__

    @functools.wraps(plan)
    def planned(self: Any, config: Any, **given: Any) -> None:
        plan(self, config=config, **given)
        if config._attn_implementation == implementation:
            self.num_attention_masks = 0
            # Only a ring is read back into tensors of its own.
            reads_back = SLIDING_ATTENTION in given["attn_types"]
            self.kv_heads_at_peak = 2 * find_num_key_value_heads(config) if reads_back else 0

    paged_cache.PagedAttentionMemoryHandler.__init__ = planned
