"""Models that accelerate has dispatched or hooked: conversion beneath its hooks, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch

from tests.integrations.tiny import (
    QUIET,
    attention_layers,
    convert_to_resformer,
    logits,
    state,
    stock,
    tokens,
)

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
hooks: Any = accelerate.hooks

pytestmark = [*QUIET]


def changed(model: Any) -> list[Any]:
    """Modules of each kind that gets another forward."""
    inner = model.base_model
    return [inner, inner.layers[2], attention_layers(model)[1]]


def device_map(model: Any) -> dict[str, str]:
    """Layers 1 and 2 on the disk."""
    inner = model.base_model_prefix
    places = {name: "cpu" for name, _ in model.named_children() if name != inner}
    places |= {f"{inner}.{n}": "cpu" for n, _ in model.base_model.named_children() if n != "layers"}
    return places | {f"{inner}.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}


def loaded_in_part(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "model")
    return type(model).from_pretrained(
        folder / "model", device_map=device_map(model), offload_folder=folder / "weights"
    )


def with_hooks(model: Any, _: Path) -> Any:
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
        hooks.add_hook_to_module(module, hooks.ModelHook(), append=True)
        hooks.add_hook_to_module(module, hooks.ModelHook(), append=True)
    return model


def with_hooks_removed(model: Any, folder: Path) -> Any:
    hooks.remove_hook_from_submodules(with_hooks(model, folder))
    return model


def with_one_hook(model: Any, _: Path) -> Any:
    hook = hooks.AlignDevicesHook("cpu", io_same_device=True, place_submodules=True)
    return hooks.add_hook_to_module(model, hook)


DISPATCHES: dict[str, Callable[[Any, Path], Any]] = {
    "loaded in part": loaded_in_part,
    "dispatched": lambda m, folder: accelerate.dispatch_model(m, device_map(m), offload_dir=folder),
    "offloaded to the CPU": lambda m, _: accelerate.cpu_offload(m, torch.device("cpu")),
    "offloaded to the disk": lambda m, folder: accelerate.disk_offload(m, folder, "cpu"),
    "offloaded between calls": lambda m, _: accelerate.cpu_offload_with_hook(m, "cpu")[0],
    "hooks everywhere": with_hooks,
    "hooks removed": with_hooks_removed,
    "one hook": with_one_hook,
    "hooks copied": lambda m, folder: copy.deepcopy(with_hooks(m, folder)),
}
"""Ways in which accelerate holds a model."""


@pytest.mark.parametrize("way", DISPATCHES)
@pytest.mark.parametrize("variant", ["learnable", "dense", "svformer"])
@pytest.mark.parametrize("family", ["Llama", "ModernBert"])
def test_a_dispatched_model_is_converted(
    family: str, variant: str, way: str, tmp_path: Path
) -> None:
    expected = logits(convert_to_resformer(stock(family), variant))
    model = DISPATCHES[way](stock(family), tmp_path)
    elsewhere = any(p.is_meta for p in attention_layers(model)[1].parameters())
    if (family, variant, elsewhere) == ("ModernBert", "svformer", True):
        with pytest.raises(TypeError, match="Wqkv's weight is offloaded"):
            convert_to_resformer(model, variant)
        assert torch.equal(logits(model), logits(stock(family)))
        return
    convert_to_resformer(model, variant)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert not any(p.is_meta for name, p in model.named_parameters() if ".v_mix." in name)
    hooks.remove_hook_from_submodules(model)
    if not any(parameter.is_meta for parameter in model.parameters()):
        assert torch.equal(logits(model), expected)


class Counting(hooks.ModelHook):
    """A hook that counts its calls."""

    calls = 0

    def pre_forward(self, module: Any, *inputs: Any, **options: Any) -> tuple[Any, Any]:
        del module
        self.calls += 1
        return inputs, options


def test_hooks_are_called_as_before() -> None:
    model = stock("Llama")
    for module in model.modules():
        hooks.add_hook_to_module(module, Counting())
    logits(model)
    convert_to_resformer(model)
    logits(model)
    counted = [m._hf_hook.calls for m in model.modules() if hasattr(m, "_hf_hook")]
    # A list of layers is never called, and RoPE's tables are made once a call.
    assert set(counted) == {0, 2}
    assert counted.count(0) == 1
    for module in changed(model):
        assert (
            module.forward.__wrapped__
            == module._old_forward
            == MethodType(type(module).forward, module)
        )


@pytest.mark.parametrize("way", DISPATCHES)
@pytest.mark.parametrize("variant", ["learnable", "svformer"])
def test_a_converted_model_is_dispatched(variant: str, way: str, tmp_path: Path) -> None:
    for family in ("Qwen2", "ModernBert"):
        expected = logits(convert_to_resformer(stock(family), variant))
        model = convert_to_resformer(stock(family), variant)
        model = DISPATCHES[way](model, tmp_path / family)
        for _ in range(2):
            assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")
def test_a_dispatched_model_generates_and_is_saved(tmp_path: Path) -> None:
    for variant in ("learnable", "svformer"):
        whole = convert_to_resformer(stock("Llama"), variant)
        model = convert_to_resformer(loaded_in_part(stock("Llama"), tmp_path / variant), variant)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(tokens(), **options), whole.generate(tokens(), **options))
        model.save_pretrained(tmp_path / variant / "converted")
        loaded = type(model).from_pretrained(tmp_path / variant / "converted")
        assert torch.equal(logits(loaded), logits(whole))


@pytest.mark.parametrize("place", range(3))
def test_a_hook_over_a_forward_of_others_is_refused(place: int) -> None:
    for family in ("Llama", "ModernBert"):
        model = stock(family)
        module = changed(model)[place]
        module.forward = MethodType(lambda self, *x, **y: type(self).forward(self, *x, **y), module)
        hooks.add_hook_to_module(module, hooks.ModelHook())
        before = state(model)
        with pytest.raises(TypeError, match="has a forward of its own"):
            convert_to_resformer(model)
        assert state(model) == before


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("Llama", "LlamaDecoderLayer", r"layers\[0\] has a hook of accelerate which loads its sub"),
        ("Qwen2", "Qwen2Attention", r"layers\[0\].self_attn has a hook of accelerate which loads"),
        ("ModernBert", "Linear", "Wqkv's weight is offloaded by a hook of accelerate"),
    ],
)
def test_weights_that_a_hook_loads_from_above_are_refused(
    family: str, name: str, message: str
) -> None:
    model = accelerate.cpu_offload(stock(family), "cpu", preload_module_classes=[name])
    before = state(model)
    with pytest.raises(TypeError, match=message):
        convert_to_resformer(model, "svformer")
    assert state(model) == before
    assert torch.equal(logits(model), logits(stock(family)))
