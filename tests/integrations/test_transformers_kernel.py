"""`attn_implementation="resformer"` in stock models: equal to eager, with the smallest mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import value_residual_attention
from tests.integrations.tiny import (
    FAMILIES,
    QUIET,
    kernel,
    left_padded,
    stock,
    tokens,
    transformers,
)

masking = transformers.masking_utils
pytestmark = [*QUIET]

Recorded = list[tuple[int, ...] | None]


@pytest.fixture
def masks() -> Iterator[Recorded]:
    """The shape of every mask made; None for no mask."""
    made: Recorded = []

    def record(*args: Any, **kwargs: Any) -> Tensor | None:
        mask = kernel.resformer_mask(*args, **kwargs)
        made.append(None if mask is None else tuple(mask.shape))
        return mask

    transformers.AttentionMaskInterface.register(kernel.NAME, record)
    yield made
    kernel.register()


def logits(model: Any, implementation: str, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


WINDOWED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}


@pytest.mark.parametrize("family", [*FAMILIES, "windowed Qwen2"])
def test_stock_models_compute_the_same(family: str, masks: Recorded) -> None:
    model = stock("Qwen2", **WINDOWED) if family == "windowed Qwen2" else stock(family)
    inputs = left_padded()
    attended = inputs["attention_mask"].bool()
    found = logits(model, kernel.NAME, **inputs)
    assert set(masks) == {(2, 11)}
    assert_same(found[attended], logits(model, "eager", **inputs)[attended])
    masks.clear()
    found = logits(model, kernel.NAME, input_ids=tokens())
    assert set(masks) == {None}
    assert_same(found, logits(model, "eager", input_ids=tokens()))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_masks_stay_small_while_generating(cache: str, masks: Recorded) -> None:
    model = stock("Llama")
    inputs = left_padded(length=11)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation(kernel.NAME)
    assert torch.equal(model.generate(**inputs, **options), expected)
    # A static cache has unused slots after its keys, which the mask hides.
    one_by_one = {(2, n) for n in (12, 13, 14)} if cache == "dynamic" else {(2, 1, 1, 14)}
    assert set(masks) == {(2, 11)} | one_by_one
    masks.clear()
    model.generate(tokens(), attention_mask=torch.ones(2, 11), **options)
    assert set(masks) == ({None} if cache == "dynamic" else {(2, 11), (2, 1, 1, 14)})


def test_packed_sequences_by_position_and_by_length(masks: Recorded) -> None:
    model = stock("Llama")
    ids = tokens(1, 9)
    # transformers derives a mask from positions only without a cache.
    inputs = {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
        "use_cache": False,
    }
    alone = torch.cat([logits(model, "eager", input_ids=x) for x in ids.split([4, 5], 1)], 1)
    found = logits(model, kernel.NAME, **inputs)
    assert masks == [(1, 1, 9, 9)]
    assert_same(found, alone)
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
    packing: dict[str, Any] = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    packing = {**packing, "max_length_q": 5, "max_length_k": 5}
    found = logits(model, kernel.NAME, **inputs, **packing)
    assert_same(found, alone)


def test_masks_of_the_caller_are_followed() -> None:
    model = stock("Llama")
    visible = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    visible |= torch.eye(11, dtype=torch.bool)
    additive = torch.zeros(2, 1, 11, 11).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = logits(model, "eager", input_ids=tokens(), attention_mask=additive)
    for mask in (visible, additive):
        assert_same(logits(model, kernel.NAME, input_ids=tokens(), attention_mask=mask), expected)
    both_ways = {"is_causal": False, "attention_mask": left_padded()["attention_mask"]}
    found = logits(model, kernel.NAME, input_ids=tokens(), **both_ways)
    expected = logits(model, "eager", input_ids=tokens(), **both_ways)
    assert_same(found, expected)


def test_only_known_mask_functions_are_taken_for_their_window() -> None:
    sliding = masking.sliding_window_causal_mask_function(3)
    custom = masking.and_masks(sliding, masking.padding_mask_function(torch.ones(1, 6) > 0))
    chunked = masking.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64))
    union = masking.or_masks(masking.sliding_window_overlay(3), masking.causal_mask_function)

    def call(function: Any, **changes: Any) -> Any:
        arguments = {"batch_size": 1, "q_length": 6, "kv_length": 6, **changes}
        return kernel.resformer_mask(mask_function=function, **arguments)

    assert call(sliding) is None
    assert call(masking.sliding_window_bidirectional_mask_function(2)) is None
    for function in (custom, chunked, union):
        assert call(function).shape == (1, 1, 6, 6)
    assert call(sliding, allow_is_causal_skip=False).shape == (1, 1, 6, 6)
    # A padding mask shorter than the keys: the mask is made in full.
    short = call(sliding, q_offset=2, kv_length=8, attention_mask=torch.ones(1, 5) > 0)
    assert short.shape == (1, 1, 6, 8)
    # A static cache with its length in a tensor: six of eight slots are used.
    counted = call(sliding, q_offset=torch.tensor(0), kv_length=8)
    assert counted.tolist() == [[True] * 6]


@pytest.mark.parametrize("queries", [7, kernel.DECODE_ROWS // 2])
def test_heads_windows_caps_and_sinks_reach_the_kernel(queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 7, 8, generator=generator) for h in (4, 2, 2))
    q = q[:, :, -queries:]
    sinks = torch.randn(4, generator=generator)
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[0, :2] = False
    module = torch.nn.Module()
    found, weights = kernel.resformer_attention(
        module, q, k, v, padding, scaling=0.3, sliding_window=3, softcap=2.0, s_aux=sinks
    )
    assert weights is None
    expected = value_residual_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        causal=True,
        window=(2, 0),
        scale=0.3,
        softcap=2.0,
        sinks=sinks,
        attn_bias=padding[:, None, None],
        backend="reference",
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    model = stock("Llama", attention_dropout=0.1)
    model.set_attn_implementation(kernel.NAME)
    model(tokens())
    model.train()
    with pytest.raises(ValueError, match=r"has no dropout, got 0\.1"):
        model(tokens())
    model = stock("Llama")
    model.set_attn_implementation(kernel.NAME)
    with pytest.raises(ValueError, match="output_attentions needs attn_implementation='eager'"):
        model(tokens(), output_attentions=True)
    with pytest.raises(ValueError, match="does not take position_bias"):
        model(tokens(), position_bias=torch.zeros(1))
