"""Greedy generation with every kind of cache equals generation without one, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.tiny import (
    DECODERS,
    QUIET,
    convert_to_resformer,
    converted,
    generate,
    left_padded,
    stock,
    tokens,
)

pytestmark = [*QUIET]

NEW = 8
both_families = pytest.mark.parametrize("family", DECODERS)
both_kinds = pytest.mark.parametrize("variant", ["learnable-plus", "svformer"])


def prompt(batch: int = 2) -> dict[str, Tensor]:
    ids = tokens(batch)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MODES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beam": {"num_beams": 3},
    "static beam": {"cache_implementation": "static", "num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@both_families
@both_kinds
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", ["sdpa", "resformer"])
def test_a_cache_changes_no_token(
    family: str, variant: str, mode: str, implementation: str
) -> None:
    model = converted(family, variant)
    model.set_attn_implementation(implementation)
    beams = {"num_beams": 3} if "beam" in mode else {}
    inputs = left_padded()
    expected = generate(model, inputs, use_cache=False, **beams)
    assert len(set(expected[0, -NEW:].tolist())) > 2
    assert torch.equal(generate(model, inputs, **MODES[mode]), expected)


@both_families
@both_kinds
@pytest.mark.parametrize("mode", ["assisted", "prompt lookup"])
def test_speculation_changes_no_token(family: str, variant: str, mode: str) -> None:
    model = converted(family, variant)
    inputs = prompt(batch=1)
    if mode == "assisted":
        # An assistant that agrees only sometimes: the same model with perturbed weights.
        options: dict[str, Any] = {"assistant_model": converted(family, variant)}
        for parameter in options["assistant_model"].lm_head.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    else:
        inputs = {name: x.repeat(1, 2) for name, x in inputs.items()}
        options = {"prompt_lookup_num_tokens": 3}
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs, **options), expected)


@both_families
@both_kinds
def test_left_padding_changes_no_token_of_a_prompt(family: str, variant: str) -> None:
    model = converted(family, variant)
    inputs = left_padded(padding=4)
    alone = inputs["input_ids"][1:, 4:]
    expected = generate(model, {"input_ids": alone, "attention_mask": torch.ones_like(alone)})
    assert torch.equal(generate(model, inputs)[1, -NEW:], expected[0, -NEW:])


@both_families
@both_kinds
def test_a_cropped_cache_goes_on_as_if_nothing_had_been_cropped(family: str, variant: str) -> None:
    model = converted(family, variant)
    ids = tokens()
    cache = model(ids[:, :6], use_cache=True).past_key_values
    model(tokens(length=3, seed=5), past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 6
    with torch.no_grad():
        continued = model(ids[:, 6:], past_key_values=cache).logits
        whole = model(ids).logits[:, 6:]
    torch.testing.assert_close(continued, whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(continued.argmax(-1), whole.argmax(-1))


@both_families
@pytest.mark.parametrize("variant", ["identity", "constant", "sparse", "learnable", "dense"])
def test_other_variants_generate_too(family: str, variant: str) -> None:
    model = converted(family, variant)
    inputs = left_padded()
    assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


@both_families
def test_svformer_caches_values_once(family: str) -> None:
    def held(model: Any) -> tuple[int, int]:
        cache = model(tokens(), use_cache=True).past_key_values
        return (
            sum(layer.keys.nbytes for layer in cache.layers),
            sum(layer.values.nbytes for layer in cache.layers),
        )

    keys, values = held(stock(family))
    assert held(converted(family, "svformer")) == (keys, values // 4)
    assert held(converted(family, "svformer", layers=[2, 3])) == (keys, values // 2)
    assert held(converted(family)) == (keys, values)


@pytest.mark.parametrize("variant", ["learnable", "svformer"])
def test_windows_in_every_layer_generate(variant: str) -> None:
    model = stock("Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0)
    convert_to_resformer(model, variant)
    inputs = left_padded()
    expected = generate(model, inputs, use_cache=False)
    assert torch.equal(generate(model, inputs), expected)
    assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)
