"""Converted models of transformers: what they compute, and saving and loading them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resformer_kernels.models import LanguageModelConfig
from resformer_kernels.models.language_model import build_value_mix as of_language_model
from resformer_kernels.nn import FixedMix, LearnedMix
from tests.integrations.tiny import (
    DECODERS,
    FAMILIES,
    QUIET,
    attention_layers,
    build_value_mix,
    convert_to_resformer,
    converted,
    families,
    left_padded,
    logits,
    stock,
    tokens,
    transformers,
)

pytestmark = [*QUIET]

all_families = pytest.mark.parametrize("family", FAMILIES)
WITH_COEFFICIENTS = ("identity", "constant", "sparse", "learnable", "learnable-plus")


def mixed_by_hooks(model: Any, mix: Callable[[list[Tensor], int], Tensor]) -> Any:
    """A stock model whose projections are overwritten: values of layer i by mix(values, i)."""
    seen: list[Tensor] = []

    def hook(layer: int) -> Callable[..., Tensor]:
        def overwrite(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if layer == 0:
                seen.clear()
            # ModernBERT's one projection holds queries, keys and values, each as wide.
            width = output.shape[-1] // 3 if hasattr(module, "Wqkv") else output.shape[-1]
            seen.append(output[..., -width:])
            return torch.cat((output[..., :-width], mix(seen, layer)), dim=-1)

        return overwrite

    for i, module in enumerate(attention_layers(model)):
        projection = module.Wqkv if hasattr(module, "Wqkv") else module.v_proj
        projection.register_forward_hook(hook(i))
    return model


@all_families
@pytest.mark.parametrize("variant", WITH_COEFFICIENTS)
def test_coefficients_0_and_1_change_no_bit(family: str, variant: str) -> None:
    inputs = left_padded()
    for implementation in ("sdpa", "eager", "resformer"):
        source = stock(family)
        source.set_attn_implementation(implementation)
        expected = source(**inputs).logits
        model = convert_to_resformer(source, variant, lambda_v=1.0, lambda_first=0.0)
        assert torch.equal(model(**inputs).logits, expected)


@all_families
@pytest.mark.parametrize("variant", [*WITH_COEFFICIENTS, "dense", "svformer"])
def test_values_are_mixed_as_the_variant_says(family: str, variant: str) -> None:
    inputs = left_padded()
    model = converted(family, variant)

    def mix(values: list[Tensor], layer: int) -> Tensor:
        coefficients = attention_layers(model)[layer].v_mix
        if layer not in model.config.value_residual_layers:
            return values[layer]
        if variant == "svformer":
            return values[0]
        if variant == "dense":
            return torch.einsum("l,l...->...", coefficients.lambda_layers, torch.stack(values))
        heads = [x.unflatten(-1, (-1, 8)) for x in (values[layer], values[0])]
        both = coefficients.lambda_v * heads[0] + coefficients.lambda_first * heads[1]
        return both.flatten(-2)

    expected = mixed_by_hooks(stock(family), mix)(**inputs).logits
    found = model(**inputs).logits
    attended = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[attended], expected[attended], rtol=1e-4, atol=2e-4)


def test_coefficients_are_those_of_the_language_model() -> None:
    for variant in WITH_COEFFICIENTS:
        config = converted("Llama", variant).config
        ours = LanguageModelConfig(variant=variant, num_layers=4, num_kv_heads=2)
        for layer in range(4):
            found, expected = build_value_mix(config, layer), of_language_model(ours, layer)
            assert type(found) is type(expected)
            if isinstance(found, (FixedMix, LearnedMix)):
                assert found.extra_repr() == expected.extra_repr()
            assert len(found.state_dict()) == len(expected.state_dict())


@all_families
def test_a_model_is_converted_in_place(family: str) -> None:
    source = stock(family)
    config, before = source.config, dict(source.named_parameters())
    model = convert_to_resformer(source)
    assert model is source
    assert type(model).__name__ == f"ResFormer{family}{type(model).__name__.split(family)[1]}"
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    new = after.keys() - before.keys()
    assert len(new) == 6
    assert all(name.split(".")[-2] == "v_mix" for name in new)
    # The config is a copy: another model may share the source's.
    assert type(config).__name__ == f"{family}Config"
    assert all(
        module.config is model.config for module in model.modules() if hasattr(module, "config")
    )


@all_families
def test_svformer_has_one_value_projection(family: str) -> None:
    whole = attention_layers(stock(family))
    for i, module in enumerate(attention_layers(converted(family, "svformer", layers=[1, 3]))):
        has_values = i in (0, 2)
        if family == "ModernBert":
            rows = 96 if has_values else 64
            assert torch.equal(module.Wqkv.weight, whole[i].Wqkv.weight[:rows])
            assert module.Wqkv.out_features == rows
        else:
            assert hasattr(module, "v_proj") == has_values


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "Model"])
@all_families
def test_other_heads_and_none(family: str, head: str, tmp_path: Path) -> None:
    model = convert_to_resformer(stock(family, head), lambda_v=1.0, lambda_first=0.0)
    expected = stock(family, head)(tokens())[0]
    assert torch.equal(model(tokens())[0], expected)
    model.save_pretrained(tmp_path)
    auto = "AutoModel" if head == "Model" else f"AutoModel{head}"
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(tokens())[0], expected)


@all_families
@pytest.mark.parametrize("variant", ["learnable-plus", "sparse", "dense", "svformer"])
def test_saved_models_load(family: str, variant: str, tmp_path: Path) -> None:
    model = converted(family, variant, layers=[1, 3])
    model.save_pretrained(tmp_path)
    auto = "AutoModelForMaskedLM" if family == "ModernBert" else "AutoModelForCausalLM"
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.value_residual, config.value_residual_layers) == (variant, [1, 3])
    assert config.model_type.startswith(("resformer_", "svformer_"))
    for cls in (getattr(transformers, auto), type(model)):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@all_families
def test_a_stock_checkpoint_loads_and_its_coefficients_are_initialised(
    family: str, tmp_path: Path
) -> None:
    source = stock(family)
    source.save_pretrained(tmp_path)
    suffix = type(source).__name__.removeprefix(family)
    cls = getattr(families, f"ResFormer{family}{suffix}")
    config = cls.config_class.from_pretrained(
        tmp_path, value_residual="learnable-plus", lambda_v=0.25
    )
    model = cls.from_pretrained(tmp_path, config=config)
    found = {n: p for n, p in model.named_parameters() if ".v_mix." in n}
    assert len(found) == 6
    for name, parameter in found.items():
        expected = 0.25 if name.endswith("lambda_v") else 0.5
        assert torch.equal(parameter, torch.full_like(parameter, expected)), name
    changes = {"value_residual": "dense", "lambda_v": None, "lambda_first": None}
    dense = cls(cls.config_class(**{**config.to_dict(), **changes}))
    assert dense.base_model.layers[3]  # built
    for i, module in enumerate(attention_layers(dense)):
        if i:
            assert module.v_mix.lambda_layers.tolist() == pytest.approx([1 / (i + 1)] * (i + 1))


@pytest.mark.parametrize("number", [np.float32, np.int64, np.array, torch.tensor])
def test_numbers_of_numpy_and_tensors_are_saved(
    number: Callable[[int], Any], tmp_path: Path
) -> None:
    for layers in (np.array([3, 1]), torch.tensor([3, 1]), (np.int8(3), np.uint64(1))):
        options = {"layers": layers, "lambda_v": number(2), "lambda_first": number(1)}
        model = convert_to_resformer(stock("Llama"), "constant", **options)
        built = type(model.config)(
            num_hidden_layers=4,
            value_residual="constant",
            value_residual_layers=layers,
            lambda_v=number(2),
            lambda_first=number(1),
        )
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoConfig.from_pretrained(tmp_path)
        for config in (model.config, built, loaded):
            assert (config.value_residual_layers, config.lambda_v) == ([1, 3], 2.0)
            found = (*config.value_residual_layers, config.lambda_v, config.lambda_first)
            assert [type(x) for x in found] == [int, int, float, float]
        expected = convert_to_resformer(
            stock("Llama"), "constant", layers=[1, 3], lambda_v=2.0, lambda_first=1.0
        )
        assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


def test_coefficients_stay_float32_beside_16_bits(tmp_path: Path) -> None:
    converted("Llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".v_mix." in name else torch.bfloat16)
    assert model(tokens()).logits.dtype == torch.bfloat16
    model.to(torch.bfloat16)
    assert model(tokens()).logits.dtype == torch.bfloat16


@all_families
def test_hidden_states_and_weights_are_recorded(family: str) -> None:
    source = stock(family)
    source.set_attn_implementation("eager")
    expected = source(tokens(), output_hidden_states=True, output_attentions=True)
    model = convert_to_resformer(stock(family), lambda_v=1.0, lambda_first=0.0)
    model.set_attn_implementation("eager")
    found = model(tokens(), output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        pairs = zip(found[name], expected[name], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    as_tuple = model(tokens(), return_dict=False)
    assert torch.equal(as_tuple[0], found.logits)


def stored(model: Any, _: Path) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def built_anew(model: Any, _: Path) -> Any:
    """Of its config on the meta device, with its weights; buffers are not in a state_dict."""
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config)).eval()
    made.load_state_dict(model.state_dict(), assign=True)
    for module, source in zip(made.modules(), model.modules(), strict=True):
        module._buffers.update(source._buffers)
    return made


def pretrained(shards: str = "1GB", **options: Any) -> Callable[[Any, Path], Any]:
    def load(model: Any, folder: Path) -> Any:
        model.save_pretrained(folder, max_shard_size=shards)
        return type(model).from_pretrained(folder, **options)

    return load


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "deep copy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": stored,
    "a new model": built_anew,
    "shards": pretrained(shards="20KB"),
    "little memory": pretrained(low_cpu_mem_usage=True),
    "device map": pretrained(device_map="auto"),
}
"""Ways to get a second model like a first."""


@pytest.mark.parametrize("way", COPIES)
@all_families
def test_copies_compute_the_same(family: str, way: str, tmp_path: Path) -> None:
    for variant in ("sparse", "learnable", "learnable-plus", "dense", "svformer"):
        model = converted(family, variant)
        expected = logits(model)
        twin = COPIES[way](model, tmp_path / variant)
        assert type(twin) is type(model)
        assert torch.equal(logits(twin), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        if way != "a new model":  # which was given the first one's tensors
            assert torch.equal(logits(model), expected)


@all_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_equals_one_converted_after_the_cast(family: str, dtype: torch.dtype) -> None:
    for variant in ("sparse", "dense", "svformer"):
        model = convert_to_resformer(stock(family), variant).to(dtype)
        after = convert_to_resformer(stock(family).to(dtype), variant)
        assert logits(model).dtype is dtype
        # The same weights; Dense's coefficients are 1/n, rounded here and float32 there.
        tolerance = 0.1 if dtype.itemsize == 2 and variant == "dense" else 0.0
        torch.testing.assert_close(logits(model), logits(after), rtol=tolerance, atol=tolerance)


def test_embeddings_instead_of_ids() -> None:
    for family in FAMILIES:
        model = converted(family)
        embedded = model.get_input_embeddings()(tokens())
        assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens()).logits)
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(tokens(), inputs_embeds=embedded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "transformer"}, "variant must be one of identity.*svformer, got 'transf"),
        ({"variant": "fused-kv-lite"}, "variant must be one of identity.*svformer, got 'fused-kv"),
        ({"layers": [0, 1]}, "layers must lie within 1 and 3: layer 0 is where"),
        ({"layers": [4]}, "layers must lie within 1 and 3"),
        ({"layers": []}, "layers must be distinct integers, at least one"),
        ({"layers": [1, 1]}, "layers must be distinct integers"),
        ({"layers": [1.5]}, "layers must be distinct integers"),
        ({"layers": [True]}, "layers must be distinct integers"),
        ({"layers": np.array([0.5])}, "layers must be distinct integers"),
        ({"layers": 2}, "layers must be distinct integers, at least one, got 2"),
        ({"variant": "svformer", "lambda_v": 1.0}, "lambda_v must be None for svformer"),
        ({"variant": "dense", "lambda_first": 1.0}, "lambda_first must be None for dense"),
        ({"lambda_v": float("nan")}, "lambda_v must be finite"),
        ({"lambda_first": np.float32("inf")}, "lambda_first must be finite"),
    ],
)
def test_wrong_options_leave_the_model_alone(options: dict[str, Any], message: str) -> None:
    model = stock("Llama")
    with pytest.raises(ValueError, match=message):
        convert_to_resformer(model, **options)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model.config).__name__ == "LlamaConfig"


def test_what_cannot_be_converted() -> None:
    with pytest.raises(TypeError, match=r"model must be one of LlamaModel.*got Linear"):
        convert_to_resformer(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="has a value residual already"):
        convert_to_resformer(converted("Llama"))
    with pytest.raises(TypeError, match="lambda_v must be a number"):
        convert_to_resformer(stock("Llama"), lambda_v=torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2 layers"):
        convert_to_resformer(stock("Llama", num_hidden_layers=1))
    model = stock("ModernBert")
    model.model.layers[2].attn.Wqkv = nn.Identity()
    with pytest.raises(TypeError, match=r"Wqkv must be a torch.nn.Linear"):
        convert_to_resformer(model, "svformer")
    assert type(model).__name__ == "ModernBertForMaskedLM"


@pytest.mark.parametrize("family", DECODERS)
def test_caches_that_cannot_share_say_so(family: str) -> None:
    model = converted(family, "svformer")
    full = stock(family)(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="prefix tuning"):
        model(tokens(), past_key_values=full)
    quantised = transformers.DynamicCache(config=model.config)
    quantised.layers[1]._quantize = None
    with pytest.raises(ValueError, match="use a cache that is not quantised"):
        model(tokens(), past_key_values=quantised)
    mixed = stock("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    model = convert_to_resformer(mixed, "svformer")
    assert model(tokens()).logits.isfinite().all()
    with pytest.raises(ValueError, match="sliding beside full attention"):
        model.generate(tokens(), max_new_tokens=3, do_sample=False)
