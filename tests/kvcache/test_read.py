"""`SharedValueCache.read`: what attention code that is not ours attends over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resformer_kernels import KVLayout, SharedValueCache
from resformer_kernels.kvcache.cache import pages


def cache_of(**storage: int | torch.dtype) -> SharedValueCache:
    return SharedValueCache(
        KVLayout.svformer(2),
        batch=2,
        num_kv_heads=2,
        head_dim=4,
        **storage,  # type: ignore[arg-type]
    )


def new(tokens: int, seed: int) -> Tensor:
    return torch.randn(2, tokens, 2, 4, generator=torch.Generator().manual_seed(seed))


def test_rows_in_order_are_views() -> None:
    cache = cache_of(max_seqlen=8)
    k, v, later = new(3, 0), new(3, 1), new(3, 2)
    cache.append(0, k, v)
    # Within a step: what is there already.
    assert torch.equal(cache.read(0)[0], k)
    with pytest.raises(RuntimeError, match="layer 1's keys of this step are missing"):
        cache.read(1)
    cache.append(1, later)
    keys, values = cache.read(1)
    assert torch.equal(keys, later)
    assert torch.equal(values, v)
    assert values.data_ptr() == cache.values.data_ptr()
    with pytest.raises(ValueError, match="layer must be 0 to 1"):
        cache.read(2)


@pytest.mark.parametrize("paged", [False, True])
def test_other_orders_are_copies(paged: bool) -> None:
    if paged and pages.unavailable_reason() is not None:
        pytest.skip(str(pages.unavailable_reason()))
    cache = cache_of(num_pages=8, page_size=2) if paged else cache_of(max_seqlen=8)
    k, v = new(5, 0), new(5, 1)
    cache.append(0, k, v)
    cache.append(1, k)
    cache.reorder([1, 0])
    for found, expected in zip(cache.read(1), (k, v), strict=True):
        assert torch.equal(found, expected[[1, 0]])
    only = cache.read(0, sequences=cache.sequences[1:])
    assert torch.equal(only[1], v[:1])


def test_codes_become_numbers() -> None:
    cache = cache_of(max_seqlen=8, dtype=torch.int8)
    k, v = new(5, 0), new(5, 1)
    cache.append(0, k, v)
    for found, expected in zip(cache.read(0), (k, v), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= expected.abs().max() / 254 + 1e-6
