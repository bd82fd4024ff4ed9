"""Conversions as changes in place: all of a model changes or nothing, whatever it is made of."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.integrations.tiny import (
    QUIET,
    attention_layers,
    convert_to_resformer,
    logits,
    state,
    stock,
    tokens,
    transformers,
)

pytestmark = [*QUIET]


class Stubborn(nn.Module):
    """A module whose config cannot be replaced."""

    def __init__(self, config: Any, error: type[BaseException]) -> None:
        super().__init__()
        self.config = config
        self.error = error

    def __setattr__(self, name: str, value: Any) -> None:
        if "error" in vars(self):
            raise self.error(name)
        super().__setattr__(name, value)


class Other(transformers.models.llama.modeling_llama.LlamaAttention):
    """A user's attention."""


def stubborn(error: type[BaseException]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.another = Stubborn(model.config, error)

    return change


def other_attention(model: Any) -> None:
    attention_layers(model)[2].__class__ = Other


def wrapped_layer(model: Any) -> None:
    model.base_model.layers[3] = nn.Sequential(model.base_model.layers[3])


def shared_layer(model: Any) -> None:
    model.base_model.layers[3] = model.base_model.layers[2]


def no_value_projection(model: Any) -> None:
    del attention_layers(model)[3].v_proj


def odd_attribute(model: Any) -> None:
    model._no_split_modules = 3


def identity_projection(model: Any) -> None:
    attention_layers(model)[2].Wqkv = nn.Identity()


def pruned_projection(model: Any) -> None:
    prune.l1_unstructured(attention_layers(model)[2].Wqkv, "weight", 0.5)


Failure = tuple[str, Callable[[Any], None], type[BaseException], str]
"""The family, what is done to its model before, and the error of the conversion."""

FAILURES: dict[str, Failure] = {
    "a config that stays": ("Llama", stubborn(RuntimeError), RuntimeError, "config"),
    "an interrupt": ("Llama", stubborn(KeyboardInterrupt), KeyboardInterrupt, "config"),
    "another attention": ("Llama", other_attention, TypeError, r"2\].self_attn must be a LlamaA"),
    "a wrapped layer": ("Llama", wrapped_layer, TypeError, "must be a LlamaDecoderLayer, got Seq"),
    "a layer used twice": ("Llama", shared_layer, TypeError, r"layers\[3\] must be a LlamaDecoder"),
    "no value projection": ("Llama", no_value_projection, AttributeError, "v_proj"),
    "an odd attribute": ("Llama", odd_attribute, TypeError, "int"),
    "no linear": ("ModernBert", identity_projection, TypeError, "torch.nn.Linear, got Identity"),
    "a pruned linear": ("ModernBert", pruned_projection, TypeError, "weight and a bias alone, got"),
}


@pytest.mark.parametrize("way", FAILURES)
def test_a_conversion_that_fails_changes_nothing(way: str) -> None:
    family, change, error, message = FAILURES[way]
    model = stock(family)
    change(model)
    before, alive = state(model), copy.copy(list(model.modules()))
    with pytest.raises(error, match=message):
        convert_to_resformer(model, "svformer")
    assert state(model) == before
    assert list(model.modules()) == alive


def test_after_a_failure_the_conversion_can_be_tried_again() -> None:
    model = stock("Llama")
    stubborn(RuntimeError)(model)
    with pytest.raises(RuntimeError):
        convert_to_resformer(model)
    assert torch.equal(logits(model), logits(stock("Llama")))
    del model.another
    assert torch.equal(
        logits(convert_to_resformer(model)), logits(convert_to_resformer(stock("Llama")))
    )


class Packed(nn.Module):
    """A linear layer that holds buffers alone, as quantised ones do."""

    qweight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight)


def packed(model: Any) -> Any:
    for module in attention_layers(model):
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(module, name, Packed(linear))
    return model


def quantised(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("linears", [packed, quantised])
@pytest.mark.parametrize("variant", ["learnable", "learnable-plus", "dense", "svformer"])
def test_linears_without_parameters(linears: Callable[[Any], Any], variant: str) -> None:
    expected = logits(linears(convert_to_resformer(stock("Llama"), variant)))
    model = convert_to_resformer(linears(stock("Llama")), variant)
    assert torch.equal(logits(model), expected)
    mixes = [p for name, p in model.named_parameters() if ".v_mix." in name]
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in mixes)


def test_a_model_on_the_meta_device_stays_there() -> None:
    with torch.device("meta"):
        model = stock("Llama")
    for variant in ("learnable", "svformer"):
        found = convert_to_resformer(copy.deepcopy(model), variant)
        assert all(parameter.is_meta for parameter in found.parameters())


@pytest.mark.parametrize(
    ("family", "variant"), [("Llama", "learnable"), ("ModernBert", "svformer")]
)
def test_a_model_converted_in_inference_mode_trains(family: str, variant: str) -> None:
    model = stock(family)
    with torch.inference_mode():
        convert_to_resformer(model, variant)
    model(tokens(), labels=tokens(seed=3)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def parts(model: Any) -> dict[str, Any]:
    """The modules that get another forward."""
    inner = model.base_model
    return {
        "model": inner,
        r"layers\[2\]": inner.layers[2],
        r"layers\[1\]": attention_layers(model)[1],
    }


def as_method(module: Any) -> None:
    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        return type(self).forward(self, *inputs, **options)

    module.forward = MethodType(forward, module)


def as_partial(module: Any) -> None:
    module.forward = functools.partial(type(module).forward, module)


def as_compiled(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


@pytest.mark.parametrize("replace", [as_method, as_partial, as_compiled])
def test_a_forward_of_others_is_refused_by_name(replace: Callable[[Any], None]) -> None:
    for family in ("Llama", "ModernBert"):
        for i, name in enumerate(parts(stock(family))):
            model = stock(family)
            replace(list(parts(model).values())[i])
            before = state(model)
            with pytest.raises(TypeError, match=f"{name}.* has a forward of its own"):
                convert_to_resformer(model)
            assert state(model) == before


@pytest.mark.parametrize("replace", [as_method, as_partial, as_compiled])
def test_the_head_may_have_a_forward_of_its_own(replace: Callable[[Any], None]) -> None:
    model = stock("Llama")
    replace(model)
    expected = logits(convert_to_resformer(stock("Llama")))
    assert torch.equal(logits(convert_to_resformer(model)), expected)


def test_compiled_modules_are_compiled_again() -> None:
    expected = logits(convert_to_resformer(stock("Llama")))
    for i in range(4):
        torch.compiler.reset()
        model = stock("Llama")
        [model, *parts(model).values()][i].compile(backend="eager")
        assert torch.equal(logits(model), logits(stock("Llama")))
        torch.testing.assert_close(logits(convert_to_resformer(model)), expected)
