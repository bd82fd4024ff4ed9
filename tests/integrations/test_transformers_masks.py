"""The masks of `attn_implementation="resformer"`: what they say, and what models may do to them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.integrations.tiny import (
    QUIET,
    causal,
    kernel,
    left_padded,
    mask_forms,
    stock,
    tokens,
    transformers,
    two_sided,
)

masking = transformers.masking_utils
KeyMask, resformer_mask, window_of = (
    mask_forms.KeyMask,
    mask_forms.resformer_mask,
    mask_forms.window_of,
)
pytestmark = [*QUIET]


def test_only_known_mask_functions_are_taken_for_their_window() -> None:
    assert window_of(causal()) == (-1, 0)
    assert window_of(two_sided()) == (-1, -1)
    assert window_of(causal(3)) == (2, 0)
    assert window_of(two_sided(3)) == (3, 3)
    padding = masking.padding_mask_function(torch.ones(1, 6) > 0)
    for function in (
        masking.and_masks(causal(3), padding),
        masking.and_masks(masking.sliding_window_overlay(3), padding),
        masking.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64)),
        masking.or_masks(masking.sliding_window_overlay(3), causal()),
        functools.partial(causal()),
    ):
        assert window_of(function) is None


@pytest.mark.parametrize(
    "function", [causal(), causal(3), two_sided(), two_sided(2)], ids=["causal", "3", "all", "2"]
)
@pytest.mark.parametrize(
    "place",
    [
        {"q_length": 6, "kv_length": 6},
        {"q_length": 2, "kv_length": 6, "q_offset": 4},
        {"q_length": 1, "kv_length": 6, "q_offset": 5},
        {"q_length": 2, "kv_length": 4, "q_offset": 4, "kv_offset": 2},
        {"q_length": 4, "kv_length": 9, "q_offset": torch.tensor(2)},
        {"q_length": 3, "kv_length": 7},
        {"q_length": 7, "kv_length": 3},
    ],
    ids=["prompt", "chunk", "token", "sliding", "static", "fewer", "more"],
)
@pytest.mark.parametrize("padding", [None, 6, 4, 12])
def test_masks_say_what_those_of_sdpa_say(
    function: Any, place: dict[str, Any], padding: int | None
) -> None:
    place = {"batch_size": 2, "mask_function": function, **place}
    if padding is not None:
        place["attention_mask"] = torch.arange(padding).expand(2, -1) != torch.tensor([[0], [3]])
    found = resformer_mask(**place)
    assert found is not None
    expected = masking.sdpa_mask(**place, allow_is_causal_skip=False)
    assert found.shape == expected.shape
    assert torch.equal(found & True, expected)
    assert torch.equal(~found[..., 1:], ~expected[..., 1:])


def test_a_mask_of_keys_survives_what_models_do_to_masks() -> None:
    padding = torch.arange(6).expand(2, -1) != 0
    mask = resformer_mask(2, 6, 6, mask_function=causal(3), attention_mask=padding)
    assert isinstance(mask, KeyMask)
    for same in (mask[:, :, :, :6], mask.detach()):
        assert isinstance(same, KeyMask)
        assert torch.equal(same.whole(), mask.whole())
    expected = masking.sdpa_mask(2, 6, 6, mask_function=causal(3), attention_mask=padding)
    for function in (
        lambda m: m[..., :4],
        lambda m: torch.where(m, 0.0, torch.finfo(torch.float32).min),
        lambda m: m.repeat_interleave(2, 0),
        lambda m: torch.cat([m, m], -1),
        lambda m: (1.0 - m.float()) * -1e4,
        lambda m: m.squeeze(1).any(-1),
        lambda m: m.clone(),
    ):
        found = function(mask)
        assert type(found) is Tensor
        assert torch.equal(found, function(expected))
    with pytest.raises(RuntimeError, match="a KeyMask cannot be written to"):
        mask.logical_not_()


@pytest.mark.parametrize("what", ["layers", "model"])
def test_compiled_models_and_layers_take_masks(what: str) -> None:
    """Layers compiled one by one get masks from outside; lengths that change do not recompile."""
    model = stock("Llama", num_hidden_layers=1)
    cases = [left_padded(n, 4) for n in (9, 11)] + [{"input_ids": tokens(length=10)}]
    expected = []
    for case in cases:
        expected.append(model(**case, use_cache=False).logits)
    model.set_attn_implementation(kernel.NAME)
    counter = CompileCounterWithBackend("aot_eager")
    for module in model.model.layers if what == "layers" else [model]:
        module.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        for case, right in zip(cases, expected, strict=True):
            attended = case["attention_mask"].bool() if "attention_mask" in case else ...
            found = model(**case, use_cache=False).logits
            torch.testing.assert_close(found[attended], right[attended], rtol=1e-4, atol=2e-4)
    # With padding: one length, then any; and without padding.
    assert counter.frame_count <= 4
