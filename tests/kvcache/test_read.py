"""`SharedValueCache.read`: keys and values for other attention code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kvcache.cache_model import DIM, KV_HEADS, LAYOUTS, VALUE_DIM, new_cache

SVFORMER = LAYOUTS["svformer"]


def new(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, tokens, KV_HEADS, dim) for dim in (DIM, VALUE_DIM))
    k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return k, v


def test_rows_in_order_are_views() -> None:
    cache = new_cache(SVFORMER, paged=False)
    k, v = new(3, 0)
    later, _ = new(3, 2)
    cache.append(0, k, v)
    # Within a step, the tokens appended so far.
    assert torch.equal(cache.read(0)[0], k)
    with pytest.raises(RuntimeError, match="layer 1's keys of this step are missing"):
        cache.read(1)
    cache.append(1, later)
    cache.append(2, later)
    keys, values = cache.read(1)
    assert torch.equal(keys, later)
    assert torch.equal(values, v)
    assert values.data_ptr() == cache.values.data_ptr()
    with pytest.raises(ValueError, match="layer must be 0 to 2"):
        cache.read(3)


def test_other_orders_are_copies(paged: bool) -> None:
    cache = new_cache(SVFORMER, paged)
    k, v = new(5, 0)
    cache.append(0, k, v)
    cache.append(1, k)
    cache.append(2, k)
    cache.reorder([1, 0])
    for found, expected in zip(cache.read(1), (k, v), strict=True):
        assert torch.equal(found, expected[[1, 0]])
    only = cache.read(0, sequences=cache.sequences[1:])
    assert torch.equal(only[1], v[:1])


def test_codes_become_numbers() -> None:
    cache = new_cache(SVFORMER, paged=False, dtype=torch.int8)
    k, v = new(5, 0)
    cache.append(0, k, v)
    for found, expected in zip(cache.read(0), (k, v), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= expected.abs().max() / 254 + 1e-6
