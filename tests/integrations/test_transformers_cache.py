"""`ResFormerCache`: the same tokens as without a cache, and its size in bytes."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from resformer_kernels import attention_with_kvcache
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
    transformers,
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


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@both_kinds
@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickled])
def test_a_prompt_is_copied_for_each_continuation(
    way: Callable[[Any], Any],
    dtype: torch.dtype | None,
    variant: str,
    storage: dict[str, Any],
) -> None:
    model = converted("Llama", variant)
    model.set_attn_implementation("resformer")
    ids = tokens()
    prompt = ResFormerCache(model.config, 24, dtype=dtype, **storage)
    assert way(prompt).length == 0
    with torch.no_grad():
        model(ids[:, :6], past_key_values=prompt)
    expected = []
    for _ in range(2):
        cache = ResFormerCache(model.config, 24, dtype=dtype, **storage)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
        expected.append(generate(model, {"input_ids": ids}, past_key_values=cache))
    for found in expected:
        twin = way(prompt)
        assert twin.nbytes == prompt.nbytes
        assert torch.equal(generate(model, {"input_ids": ids}, past_key_values=twin), found)
        twin.reorder_cache(torch.tensor([1, 0]))
        assert prompt.length == 6
    assert torch.equal(generate(model, {"input_ids": ids}, past_key_values=prompt), expected[0])


@both_kinds
@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_a_reset_cache_takes_any_batch(
    variant: str, dtype: torch.dtype | None, storage: dict[str, Any]
) -> None:
    model = converted("Llama", variant)
    cache = ResFormerCache(model.config, 24, dtype=dtype, **storage)
    for batch, beams in ((2, 1), (1, 1), (3, 1), (3, 1), (1, 3), (2, 1)):
        inputs = {"input_ids": tokens(batch)}
        fresh = ResFormerCache(model.config, 24, dtype=dtype, **storage)
        expected = generate(model, inputs, past_key_values=fresh, num_beams=beams)
        store = cache.store
        found = generate(model, inputs, past_key_values=cache, num_beams=beams)
        assert torch.equal(found, expected)
        same = store is not None and len(store.sequences) == batch * beams
        assert (cache.store is store) == same
        assert (cache.batch_size, cache.nbytes) == (fresh.batch_size, fresh.nbytes)
        with pytest.raises(
            ValueError, match=r"holds 18 tokens .* After reset\(\) it takes another"
        ):
            generate(model, {"input_ids": tokens(batch + 9)}, past_key_values=cache)
        assert cache.length == 18
        cache.reset()
    double = model.double()
    with torch.no_grad():
        expected = double(tokens(), use_cache=False).logits
        cache = ResFormerCache(model.config, 24)
        model.float()(tokens(), past_key_values=cache)
        cache.reset()
        found = model.double()(tokens(), past_key_values=cache).logits
    torch.testing.assert_close(found, expected)


@both_kinds
@pytest.mark.parametrize("implementation", ["sdpa", "resformer"])
def test_a_cache_made_in_inference_mode_is_used_outside_of_it(
    variant: str, implementation: str, storage: dict[str, Any]
) -> None:
    model = converted("Llama", variant).requires_grad_(requires_grad=False)
    model.set_attn_implementation(implementation)
    ids = tokens()
    expected = model(ids).logits[:, 6:]
    cache = ResFormerCache(model.config, 24, **storage)
    with torch.inference_mode():
        model(ids[:, :6], past_key_values=cache)
        twin = pickled(copy.deepcopy(cache))
    for each in (cache, twin):
        each.reorder_cache(torch.tensor([1, 0]))
        each.reorder_cache(torch.tensor([1, 0]))
        found = model(ids[:, 6:], past_key_values=each).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "resformer"])
@pytest.mark.parametrize("trained", ["k_proj", "v_proj", "q_proj"])
def test_gradients_are_refused_not_wrong(trained: str, implementation: str) -> None:
    model = converted("Llama").requires_grad_(requires_grad=False)
    model.set_attn_implementation(implementation)
    model.get_submodule(f"model.layers.3.self_attn.{trained}").requires_grad_()
    cache = ResFormerCache(model.config, 24)
    with pytest.raises(RuntimeError, match="gradient"):
        sum(
            model(tokens()[:, i : i + 1], past_key_values=cache).logits.sum() for i in range(3)
        ).backward()


@pytest.mark.parametrize("number", [np.int64, np.array, torch.tensor])
def test_sizes_may_be_numbers_of_numpy(number: Callable[[int], Any]) -> None:
    model = converted("Llama", "svformer")
    cache = ResFormerCache(model.config, number(24))
    assert (type(cache.max_seqlen), cache.max_seqlen) == (int, 24)
    found = generate(model, left_padded(), past_key_values=cache)
    assert torch.equal(found, generate(model, left_padded()))
    cache = ResFormerCache(model.config, 24, page_size=number(4), num_pages=number(5))
    assert [type(x) for x in (cache.page_size, cache.num_pages)] == [int, int]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen3Next": ({}, "linear_attention"),
    "Bamba": ({}, "linear_attention"),
    "Jamba": ({}, "linear_attention"),
    "Zamba": ({}, "hybrid, linear_attention"),
    "Zamba2": ({}, "hybrid, linear_attention"),
    "FalconH1": ({}, "hybrid"),
    "MiniMax": ({}, "linear_attention"),
    "GraniteMoeHybrid": ({}, "linear_attention"),
    "RecurrentGemma": ({}, "linear_attention|recurrent"),
    "NemotronH": ({}, "moe"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv|linear"),
    "Gemma3nText": ({}, "layers that reuse the keys and values of others"),
    "Gemma3n": ({}, "layers that reuse"),
    "Mllama": ({}, "cross-attention"),
    "Bart": ({}, "cross-attention"),
    "T5": ({}, "cross-attention"),
    "GPT2": ({"add_cross_attention": True}, "cross-attention"),
    "Bark": ({}, "no num_hidden_layers"),
}
"""Configs of models whose layers do not all cache keys and values: changes, and what is said."""


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_cache_other_things_are_refused(name: str) -> None:
    changes, said = OTHERS[name]
    config = getattr(transformers, f"{name}Config")(**changes)
    with pytest.raises(ValueError, match=f"config, a {name}Config, has .*({said})"):
        ResFormerCache(config, 24)


@pytest.mark.parametrize("name", ["Mistral", "Gemma3", "Llama4", "Qwen2VL", "GptOss", "GPT2"])
def test_models_of_windows_chunks_and_several_media_are_served(name: str) -> None:
    config = getattr(transformers, f"{name}Config")()
    layers = config.get_text_config().num_hidden_layers
    assert len(ResFormerCache(config, 24).layers) == layers


def test_a_multimodal_model_may_use_it() -> None:
    text = stock("Llama").config
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=2)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    found = generate(model, left_padded(), past_key_values=ResFormerCache(model.config, 24))
    assert torch.equal(found, generate(model, left_padded()))


def test_what_the_cache_refuses() -> None:
    model = converted("Llama", "svformer")
    with pytest.raises(ValueError, match="num_pages needs a page_size"):
        ResFormerCache(model.config, 24, num_pages=3)
    with pytest.raises(TypeError, match="config must be a config of transformers, got SV"):
        ResFormerCache(model, 24)
    with pytest.raises(TypeError, match="max_seqlen must be an int, got 2"):
        ResFormerCache(model.config, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="page_size must be at least 1"):
        ResFormerCache(model.config, 24, page_size=0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_reads_and_fills_a_static_cache_in_place(dtype: torch.dtype) -> None:
    config = stock("Llama", num_hidden_layers=1).config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // heads
    q = torch.randn(2, 1, heads, dim, dtype=dtype)
    k, v = (torch.randn(2, kv_heads, 12, dim, dtype=dtype) for _ in range(2))
    cache = transformers.StaticCache(config, 16)
    cache.update(k[:, :, :11], v[:, :, :11], 0)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    last_k, last_v = (x[:, :, 11:].transpose(1, 2) for x in (k, v))
    found = attention_with_kvcache(
        q, keys.transpose(1, 2), values.transpose(1, 2), last_k, last_v, cache_seqlens=11
    )
    assert torch.equal(keys[:, :, :12], k)
    assert torch.equal(values[:, :, :12], v)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2).double(), k.double(), v.double(), enable_gqa=True
    )
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), rtol=bound, atol=bound)
