"""`ResFormerCache`: the same tokens as without a cache, and its size in bytes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from resformer_kernels.kvcache.cache import pages
from tests.integrations.tiny import (
    QUIET,
    ResFormerCache,
    convert_to_resformer,
    converted,
    generate,
    left_padded,
    stock,
    tokens,
)

pytestmark = [*QUIET]

both_kinds = pytest.mark.parametrize("variant", ["learnable", "svformer"])


@pytest.fixture(params=["contiguous", "paged"])
def storage(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of both storages; paging skips without the host module, or fails if required."""
    reason = pages.unavailable_reason()
    if request.param == "paged" and reason is not None:
        if os.environ.get("CI") or os.environ.get("RESFORMER_REQUIRE_NATIVE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return {"page_size": 4} if request.param == "paged" else {}


@both_kinds
@pytest.mark.parametrize(
    ("family", "implementation"),
    [("Qwen2", "sdpa"), ("Llama", "resformer")],
)
def test_the_cache_changes_no_token(
    family: str, variant: str, implementation: str, storage: dict[str, Any]
) -> None:
    model = converted(family, variant)
    model.set_attn_implementation(implementation)
    inputs = left_padded()
    for mode in ({}, {"num_beams": 3}):
        expected = generate(model, inputs, use_cache=False, **mode)
        cache = ResFormerCache(model.config, 24, **storage)
        assert torch.equal(generate(model, inputs, past_key_values=cache, **mode), expected)
    cache = ResFormerCache(model.config, 24, **storage)
    found = generate(model, inputs, past_key_values=cache, prefill_chunk_size=4)
    assert torch.equal(found, generate(model, inputs))
    # Generation continues from the cache; a reset empties it.
    ids = torch.cat([found, tokens(length=2)], dim=1)
    longer = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    options = {"max_new_tokens": 2, "do_sample": False}
    expected = model.generate(**longer, **options)
    assert torch.equal(model.generate(**longer, past_key_values=cache, **options), expected)
    cache.reset()
    assert torch.equal(generate(model, inputs, past_key_values=cache), found)


@both_kinds
def test_speculation_crops_the_cache(variant: str, storage: dict[str, Any]) -> None:
    model = converted("Llama", variant)
    ids = tokens(1).repeat(1, 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(model, inputs, use_cache=False)
    cache = ResFormerCache(model.config, 40, **storage)
    found = generate(model, inputs, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)
    assistant = converted("Llama", variant, layers=[1])
    cache = ResFormerCache(model.config, 40, **storage)
    found = generate(model, inputs, past_key_values=cache, assistant_model=assistant)
    assert torch.equal(found, expected)


def test_windows_beside_full_attention_share_values(storage: dict[str, Any]) -> None:
    source = stock("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    model = convert_to_resformer(source, "svformer")
    inputs = left_padded()
    expected = generate(model, inputs, use_cache=False)
    for implementation in ("sdpa", "resformer"):
        model.set_attn_implementation(implementation)
        cache = ResFormerCache(model.config, 24, **storage)
        assert torch.equal(generate(model, inputs, past_key_values=cache), expected)


def test_a_stock_model_may_use_it() -> None:
    model = stock("Llama")
    cache = ResFormerCache(model.config, 24)
    found = generate(model, left_padded(), past_key_values=cache)
    assert torch.equal(found, generate(model, left_padded()))


def test_bytes_are_those_of_one_slot_of_values() -> None:
    def nbytes(variant: str, dtype: torch.dtype | None = None, **options: Any) -> int:
        model = converted("Llama", variant, **options)
        cache = ResFormerCache(model.config, 16, dtype=dtype)
        assert cache.nbytes == 0
        with torch.no_grad():
            model(tokens(), past_key_values=cache)
        return cache.nbytes

    # 4 layers, 2 sequences of 16 tokens, 2 heads of 8, float32.
    slot = 2 * 16 * 2 * 8 * 4
    assert nbytes("learnable") == 8 * slot
    assert nbytes("svformer") == 5 * slot
    assert nbytes("svformer", layers=[2, 3]) == 6 * slot
    # One byte per code, and a scale of four bytes per eight codes.
    assert nbytes("svformer", torch.int8) == 5 * slot * 12 // 32


@pytest.mark.parametrize("implementation", ["sdpa", "resformer"])
def test_int8_stays_near(implementation: str) -> None:
    model = converted("Llama", "svformer")
    model.set_attn_implementation(implementation)
    ids = tokens()
    cache = ResFormerCache(model.config, 16, dtype=torch.int8)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        found = model(ids[:, 6:], past_key_values=cache).logits
        expected = model(ids).logits[:, 6:]
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_what_the_cache_refuses() -> None:
    model = converted("Llama", "svformer")
    with pytest.raises(ValueError, match="num_pages needs a page_size"):
        ResFormerCache(model.config, 24, num_pages=3)
    cache = ResFormerCache(model.config, 12)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        model(tokens(), past_key_values=cache)
    with pytest.raises(RuntimeError, match="the cache is full"):
        generate(model, left_padded(), past_key_values=cache)
    with pytest.raises(ValueError, match="tokens_to_remove must be negative or 0"):
        cache.crop(2)
    assert cache.length == 12
    assert cache.batch_size == 2
    with pytest.raises(RuntimeError, match="rows are free"):
        cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([False, True]))
    assert cache.batch_size == 1
