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
    causal,
    kernel,
    left_padded,
    mask_forms,
    stock,
    tokens,
    transformers,
    two_sided,
)

KeyMask, resformer_mask = mask_forms.KeyMask, mask_forms.resformer_mask
pytestmark = [*QUIET]

Recorded = list[tuple[int, ...] | None]


def held(mask: Tensor | None) -> tuple[int, ...] | None:
    """The shape of what a mask holds; None where it holds no tensor that matters."""
    if isinstance(mask, KeyMask):
        return tuple(mask.keys.shape) if mask.padded else None
    return None if mask is None else tuple(mask.shape)


@pytest.fixture
def masks() -> Iterator[Recorded]:
    """What every mask made holds."""
    made: Recorded = []

    def record(*args: Any, **kwargs: Any) -> Tensor | None:
        mask = resformer_mask(*args, **kwargs)
        made.append(held(mask))
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
    assert set(masks) == ({None} if cache == "dynamic" else {None, (2, 1, 1, 14)})


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


def attend(mask: Any, queries: int = 7, keys: int = 7, module: Any = None, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 8, generator=generator)
    k, v = (torch.randn(2, 2, keys, 8, generator=generator) for _ in range(2))
    module = torch.nn.Module() if module is None else module
    found, weights = kernel.resformer_attention(module, q, k, v, mask, **kwargs)
    assert weights is None
    return found


def by_hand(
    mask: Any, queries: int = 7, keys: int = 7, bias: Any = None, scale: float = 8**-0.5
) -> Tensor:
    """Softmax attention of the same tensors."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 8, generator=generator)
    k, v = (
        torch.randn(2, 2, keys, 8, generator=generator).repeat_interleave(2, 1) for _ in range(2)
    )
    scores = scale * (q @ k.transpose(2, 3))
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("queries", [7, kernel.DECODE_ROWS // 2, 1])
def test_heads_windows_caps_and_sinks_reach_the_kernel(queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 7, 8, generator=generator) for h in (4, 2, 2))
    q = q[:, :, -queries:]
    sinks = torch.randn(4, generator=generator)
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[0, :2] = False
    mask = KeyMask(padding, (2, 0), True, (queries, 7))
    found, weights = kernel.resformer_attention(
        torch.nn.Module(), q, k, v, mask, scaling=0.3, softcap=2.0, s_aux=sinks
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


@pytest.mark.parametrize("said", [True, False, None])
def test_the_mask_decides_whatever_the_module_says(said: bool | None) -> None:
    module = torch.nn.Module()
    if said is not None:
        module.is_causal = said  # type: ignore[assignment]
    padding = torch.arange(7).expand(2, -1) != torch.tensor([[6], [3]])
    for function, allowed in (
        (causal(), torch.ones(7, 7).tril() > 0),
        (two_sided(), torch.ones(7, 7) > 0),
    ):
        mask = resformer_mask(2, 7, 7, mask_function=function, attention_mask=padding)
        for given in ({}, {"is_causal": not said}, {"sliding_window": 2}):
            found = attend(mask, module=module, **given)
            expected = by_hand(allowed & padding[:, None, None])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 7), (3, 7), (7, 3)])
def test_without_a_mask_causality_is_that_of_sdpa(queries: int, keys: int) -> None:
    torch.testing.assert_close(
        attend(None, queries, keys, is_causal=False), by_hand(None, queries, keys)
    )
    allowed = torch.ones(queries, keys).tril() > 0 if queries > 1 else None
    torch.testing.assert_close(attend(None, queries, keys), by_hand(allowed, queries, keys))


@pytest.mark.parametrize("queries", [7, 2])
def test_position_biases_are_added(queries: int) -> None:
    bias = torch.randn(1, 4, queries, 7, generator=torch.Generator().manual_seed(1))
    padding = torch.arange(7).expand(2, -1) != torch.tensor([[6], [3]])
    keys = resformer_mask(
        2, queries, 7, 7 - queries, mask_function=causal(3), attention_mask=padding
    )
    assert isinstance(keys, KeyMask)
    allowed = keys.whole()
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    for mask in (keys, allowed, additive):
        torch.testing.assert_close(
            attend(mask, queries, position_bias=bias), by_hand(allowed, queries, bias=bias)
        )
    torch.testing.assert_close(
        attend(None, queries, position_bias=bias, is_causal=False),
        by_hand(None, queries, bias=bias),
    )


def test_dropout_is_that_of_sdpa() -> None:
    model = stock("Llama", attention_dropout=0.3).train()
    inputs = left_padded()

    def trained(implementation: str) -> Tensor:
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        found: Tensor = model(**inputs).logits
        return found

    found = trained(kernel.NAME)
    assert torch.equal(found, trained("sdpa"))
    torch.manual_seed(1)
    assert not torch.equal(found, model(**inputs).logits)
    model.eval()
    attended = inputs["attention_mask"].bool()
    assert_same(
        logits(model, kernel.NAME, **inputs)[attended], logits(model, "eager", **inputs)[attended]
    )
    mask = resformer_mask(2, 7, 7)
    for name, given in (("softcap", {"softcap": 2.0}), ("sinks", {"s_aux": torch.zeros(4)})):
        with pytest.raises(ValueError, match=rf"SDPA, which has no {name}.*got dropout 0\.3"):
            attend(mask, dropout=0.3, **given)


def test_attention_weights_are_none_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transformers.logging.set_verbosity_warning()
    transformers.utils.logging.warning_once.cache_clear()
    model = stock("Llama")
    model.set_attn_implementation(kernel.NAME)
    expected = model(tokens()).logits
    found = model(tokens(), output_attentions=True)
    transformers.logging.set_verbosity_error()
    assert torch.equal(found.logits, expected)
    assert not any(torch.is_tensor(weights) for weights in found.attentions or ())
    assert caplog.text.count("output_attentions=True are None") == 1


def test_packed_sequences_need_to_know_their_order() -> None:
    lengths = torch.tensor([0, 3, 7], dtype=torch.int32)
    packing: dict[str, Any] = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    packing = {**packing, "max_length_q": 4, "max_length_k": 4}
    q = torch.randn(1, 2, 7, 8)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="packed sequences need is_causal: Module has no such"):
        kernel.resformer_attention(module, q, q, q, None, **packing)
    found, _ = kernel.resformer_attention(
        module, q, q, q, None, is_causal=False, sliding_window=2, **packing
    )
    near = (torch.arange(7)[:, None] - torch.arange(7)).abs() < 2
    together = (torch.arange(7) < 3)[:, None] == (torch.arange(7) < 3)
    scores = (q @ q.transpose(2, 3) * 8**-0.5).masked_fill(~(near & together), -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ q).transpose(1, 2))


OWN_ATTENTION = ("Bloom", "XGLM", "CodeGen", "Falcon", "GPTJ", "GPTNeo", "RoFormer", "RemBert")


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_models_with_attention_of_their_own_are_refused(family: str) -> None:
    config = getattr(transformers, f"{family}Config")()
    head = "ForCausalLM" if hasattr(transformers, f"{family}ForCausalLM") else "LMHeadModel"
    config.is_decoder = True
    made = getattr(transformers, family + head)
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=rf"{made.__name__} does not support .*=\'resformer\': its"),
    ):
        made._from_config(config, attn_implementation=kernel.NAME)


def test_a_refused_implementation_changes_nothing() -> None:
    model = stock("Llama")

    class Own(type(model)):  # type: ignore[misc]
        _supports_sdpa = _supports_flash_attn = False

    model.__class__ = Own
    with pytest.raises(ValueError, match=r"Own does not support .* neither sdpa nor flash"):
        model.set_attn_implementation(kernel.NAME)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("queries", [7, 2])
def test_keys_are_selected_by_index(queries: int) -> None:
    generator = torch.Generator().manual_seed(2)
    indices = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(2 * queries)])
    indices = indices.view(2, queries, 3).int()
    indices[..., 0] = 0  # A query that may attend to nothing gives zeros.
    chosen = torch.zeros(2, queries, 7, dtype=torch.bool).scatter(-1, indices.long(), True)[:, None]
    keys = resformer_mask(2, queries, 7, 7 - queries)
    assert isinstance(keys, KeyMask)
    allowed = keys.whole()
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    for mask in (keys, allowed, additive):
        found = attend(mask, queries, indices=indices)
        torch.testing.assert_close(found, by_hand(allowed & chosen, queries))
    torch.testing.assert_close(attend(None, queries, indices=indices), by_hand(chosen, queries))


@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (1, 1, 1, 7), (2, 1, 1, 1), (1, 1, 1, 1), (1, 7)])
def test_masks_broadcast_as_those_of_sdpa(shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 2:4] = False
    for queries in (1, 7):
        torch.testing.assert_close(attend(mask, queries), by_hand(mask, queries))


def test_an_image_encoder_with_attention_of_its_own_stays_with_sdpa() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    config = transformers.SamVisionConfig(**sizes, patch_size=8, output_channels=8, window_size=2)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for implementation in ("sdpa", kernel.NAME):
        torch.manual_seed(0)
        made = transformers.SamVisionModel._from_config(config, attn_implementation=implementation)
        assert made.vision_encoder.config._attn_implementation == "sdpa"
        found.append(made.eval()(pixels).last_hidden_state)
    assert torch.equal(*found)
