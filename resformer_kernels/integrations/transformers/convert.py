"""Conversion of a stock model into a value-residual one."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from resformer_kernels.integrations.transformers.config import RESFORMER_VARIANTS, SVFORMER
from resformer_kernels.integrations.transformers.families import (
    FAMILIES,
    KINDS,
    Family,
    restructure,
)
from resformer_kernels.integrations.transformers.in_place import all_or_nothing, change_class
from resformer_kernels.integrations.transformers.model import (
    ValueResidualPreTrained,
    refuse_reentrant,
)
from resformer_kernels.integrations.transformers.parallel import distribute_mixes


def convert_to_resformer(
    model: Any,
    variant: str = "learnable",
    layers: Iterable[int] | None = None,
    *,
    lambda_v: float | None = None,
    lambda_first: float | None = None,
) -> Any:
    """Add a value residual (Zhou et al., arXiv 2410.17897) to Llama, Qwen2 or ModernBERT, in place.

    The chosen layers attend over `V' = lambda_v * V + lambda_first * V1`, where V1 are the values
    of layer 0; with "svformer" over V1 alone, and their `v_proj` is removed. With `lambda_v=1.0,
    lambda_first=0.0` the converted model's outputs equal the source's, to the bit; the variants'
    default coefficients change a trained model's output.

    A model that accelerate has dispatched (`device_map`, offloading) keeps its hooks. Where this
    raises, the model is as it was.

    Args:
        model: a model of transformers, with or without a head, such as `LlamaForCausalLM`.
            Convert it before it, or a layer of it, is wrapped (PEFT) or sharded (FSDP2).
        variant: "identity", "constant", "sparse" (fixed coefficients), "learnable" (a pair per
            layer), "learnable-plus" (a pair per KV head), "dense" (learned, over all earlier
            layers) or "svformer"; see `resformer_kernels.models.VARIANTS`.
        layers: the layers to convert, counted from 0, without layer 0. None: all others; for
            "sparse" the last three eighths.
        lambda_v: replaces the variant's coefficient of this layer's values, or its initial value
            where it is learned. Not for "dense" and "svformer".
        lambda_first: the same for the first layer's values.

    Returns:
        The model itself, now for instance a `ResFormerLlamaForCausalLM`, with a copy of its config
        that holds the variant. Parameters keep their names and identity. Learned coefficients are
        new float32 parameters, `...v_mix.lambda_v` and `...v_mix.lambda_first`: add them to the
        optimiser.

    Raises:
        TypeError: model's class cannot be converted, model is already converted, a layer of it is
            not the stock one or has a forward of its own, or "svformer" cannot split its weights.
        ValueError: variant, layers or a coefficient is out of range, or the model checkpoints its
            layers with use_reentrant=True.
    """
    family = _family(model)
    kind = _kind(variant)
    stock_config = model.config
    config = copy.deepcopy(stock_config)
    config.__class__ = family.configs[kind]
    config.value_residual = variant
    config.value_residual_layers = layers
    config.lambda_v, config.lambda_first = lambda_v, lambda_first
    config.resolve_value_residual()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            refuse_reentrant(module._gradient_checkpointing_func)
    with all_or_nothing(model):
        for module in model.modules():
            if getattr(module, "config", None) is stock_config:
                module.config = config
        change_class(model, "model", type(model), family.models[kind][type(model)])
        restructure(model)
        distribute_mixes(model)
        for part in {model, model.base_model}:
            for name in ("_no_split_modules", "_keep_in_fp32_modules_strict"):
                setattr(part, name, {*(getattr(part, name) or ()), *getattr(type(part), name)})
    return model


def _family(model: Any) -> Family:
    if isinstance(model, ValueResidualPreTrained):
        raise TypeError(f"model has a value residual already, got {type(model).__name__}")
    known: list[str] = []
    for family in FAMILIES:
        classes = family.models["ResFormer"]
        if type(model) in classes:
            return family
        known.extend(stock.__name__ for stock in classes)
    hint = "; convert the model inside it first" if isinstance(model, nn.Module) else ""
    raise TypeError(f"model must be one of {', '.join(known)}, got {type(model).__name__}{hint}")


def _kind(variant: str) -> str:
    for kind, variants in KINDS.items():
        if variant in variants:
            return kind
    raise ValueError(
        f"variant must be one of {', '.join((*RESFORMER_VARIANTS, SVFORMER))}, got {variant!r}"
    )
