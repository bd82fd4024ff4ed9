"""The classes of each family, built from the shared parts and the family's stock classes.

A family has one attention and one layer class; and for each of ResFormer and SVFormer a config, an
inner model and the models with a head, named by `ResFormer` or `SVFormer` and the stock name. They
are registered with transformers' Auto classes when this module is imported.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from transformers.models.llama import modeling_llama
from transformers.models.modernbert import modeling_modernbert
from transformers.models.qwen2 import modeling_qwen2
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from resformer_kernels.integrations.transformers.attention import (
    DecoderAttention,
    EncoderAttention,
)
from resformer_kernels.integrations.transformers.config import (
    RESFORMER_VARIANTS,
    SVFORMER,
    ValueResidualFields,
    build_value_mix,
)
from resformer_kernels.integrations.transformers.in_place import change_class, device_of
from resformer_kernels.integrations.transformers.loading import register_scalars
from resformer_kernels.integrations.transformers.model import (
    DecoderModel,
    EncoderModel,
    ResidualLayer,
    ValueResidualPreTrained,
)
from resformer_kernels.integrations.transformers.parallel import with_mixes

KINDS = {"ResFormer": RESFORMER_VARIANTS, "SVFormer": (SVFORMER,)}
"""The variants that the classes of each prefix implement."""


@dataclass(frozen=True)
class Parts:
    """The parts in which families differ.

    Attributes:
        name: the prefix of its class names.
        modeling: its module in transformers.
        layer: the suffix of its layer class's name.
        layer_attributes: the names of a layer's attention and norms.
        attention, model: the shared implementations it uses.
        heads: the class-name suffixes of its models with a head.
    """

    name: str
    modeling: Any
    layer: str
    layer_attributes: dict[str, Any]
    attention: type
    model: type
    heads: tuple[str, ...]

    def stock(self, suffix: str) -> type:
        """The stock class with that suffix."""
        found: type = getattr(self.modeling, self.name + suffix)
        return found


_LLAMA = Parts(
    "Llama",
    modeling_llama,
    layer="DecoderLayer",
    layer_attributes={
        "attention_name": "self_attn",
        "norm_names": ("input_layernorm", "post_attention_layernorm"),
    },
    attention=DecoderAttention,
    model=DecoderModel,
    heads=("ForCausalLM", "ForSequenceClassification", "ForTokenClassification"),
)
_MODERNBERT = Parts(
    "ModernBert",
    modeling_modernbert,
    layer="EncoderLayer",
    layer_attributes={"attention_name": "attn", "norm_names": ("attn_norm", "mlp_norm")},
    attention=EncoderAttention,
    model=EncoderModel,
    heads=("ForMaskedLM", *_LLAMA.heads[1:], "ForQuestionAnswering"),
)
PARTS = (_LLAMA, replace(_LLAMA, name="Qwen2", modeling=modeling_qwen2), _MODERNBERT)
"""Every family."""


@dataclass(frozen=True)
class Family:
    """A family's value-residual classes."""

    parts: Parts
    attention: Any
    layer: Any
    configs: dict[str, type] = field(default_factory=dict)
    """Config classes by prefix: "ResFormer", "SVFormer"."""
    models: dict[str, dict[type, type]] = field(default_factory=dict)
    """By prefix: from each stock model class to the class that replaces it."""


def _publish(name: str, bases: tuple[type, ...], **attributes: Any) -> type:
    """Make a class of this module, which pickle and `from_pretrained` find under its name."""
    made = type(name, bases, {"__module__": __name__, **attributes})
    setattr(sys.modules[__name__], name, made)
    return made


def _head_init(self: Any, config: Any, **kwargs: Any) -> None:
    """Build the stock model, then add the residual to its layers."""
    super(self._built_by, self).__init__(config, **kwargs)
    restructure(self)


def _make_family(parts: Parts) -> Family:
    prefix = f"ValueResidual{parts.name}"
    attention = _publish(
        f"{prefix}Attention",
        (parts.attention, parts.stock("Attention")),
        __doc__=f"{parts.name}'s attention over mixed or shared values.",
        rotate=staticmethod(parts.modeling.apply_rotary_pos_emb),
        eager=staticmethod(parts.modeling.eager_attention_forward),
    )
    layer = _publish(
        f"{prefix}{parts.layer}",
        (ResidualLayer, parts.stock(parts.layer)),
        __doc__=f"{parts.name}'s layer, which takes and returns values.",
        **parts.layer_attributes,
    )
    family = Family(parts, attention, layer)
    for kind, variants in KINDS.items():
        _make_models(family, kind, variants)
    return family


def _make_models(family: Family, kind: str, variants: tuple[str, ...]) -> None:
    parts = family.parts
    stock_config = parts.stock("Model").config_class  # type: ignore[attr-defined]
    config = _publish(
        f"{kind}{parts.name}Config",
        (ValueResidualFields, stock_config),
        __doc__=f"{stock_config.__name__} and the fields of `ValueResidualFields`.",
        model_type=f"{kind.lower()}_{stock_config.model_type}",
        variants=variants,
        base_model_tp_plan=with_mixes(
            stock_config.base_model_tp_plan, parts.layer_attributes["attention_name"]
        ),
        # The config is a dataclass, so overriding the default takes an annotated field.
        __annotations__={"value_residual": str},
        value_residual="learnable" if "learnable" in variants else variants[0],
    )
    family.configs[kind] = config
    family.models[kind] = {}
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)  # type: ignore[attr-defined]
    register_scalars(config.model_type)  # type: ignore[attr-defined]
    for suffix in ("Model", *parts.heads):
        stock = parts.stock(suffix)
        shared = parts.model if suffix == "Model" else ValueResidualPreTrained
        made = _publish(
            f"{kind}{parts.name}{suffix}",
            (shared, stock),
            __doc__=f"{stock.__name__} with a value residual: {', '.join(variants)}.",
            __init__=_head_init,
            config_class=config,
            _no_split_modules=[*(stock._no_split_modules or ()), family.layer.__name__],  # type: ignore[attr-defined]
        )
        made._built_by = made  # type: ignore[attr-defined]
        family.models[kind][stock] = made
        # output_hidden_states reads this registry, a dict by str(class), which is filled when a
        # model is built; a converted model is not built as this class.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(made), made._can_record_outputs)  # type: ignore[attr-defined]
        auto = getattr(transformers, "AutoModel" + suffix.removeprefix("Model"))
        auto.register(config, made, exist_ok=True)


FAMILIES = tuple(_make_family(parts) for parts in PARTS)
"""The families and their classes."""


def family_of(config: Any) -> tuple[Family, str]:
    """The family of a value-residual config, and its classes' prefix."""
    for family in FAMILIES:
        for kind, config_class in family.configs.items():
            if isinstance(config, config_class):
                return family, kind
    raise TypeError(f"config must be of a value-residual model, got {type(config).__name__}")


@torch.inference_mode(False)  # Parameters made in inference mode could never be trained.
def restructure(model: Any) -> None:
    """Add the residual that model.config describes to the layers of a stock model, in place.

    Modules change their class and keep their identity, weights and hooks. TypeError where one has
    another class than the stock one, or could not follow its change: see `change_class`.
    """
    family, kind = family_of(model.config)
    stock = family.parts.stock
    inner_class = family.models[kind][stock("Model")]
    inner: Any = model if isinstance(model, inner_class) else model.base_model
    if isinstance(inner.layers[0], family.layer):
        return  # AutoModel built the inner model of this head, with the residual.
    if inner is not model:
        change_class(inner, model.base_model_prefix, stock("Model"), inner_class)
    for i, layer in enumerate(inner.layers):
        name = f"layers[{i}]"
        change_class(layer, name, stock(family.parts.layer), family.layer)
        attention = getattr(layer, layer.attention_name)
        name = f"{name}.{layer.attention_name}"
        change_class(attention, name, stock("Attention"), family.attention)
        with device_of(attention, layer, model):
            v_mix = build_value_mix(model.config, i)
        attention.set_mix(v_mix.train(attention.training), i == 0 and kind == "SVFormer")
