"""Layers and inner models: the stock ones, plus the values passed between layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from resformer_kernels._core import across
from resformer_kernels.integrations.transformers.kernel import NAME
from resformer_kernels.nn import DenseMix, LearnedMix


def refuse_reentrant(checkpoint_function: Any) -> None:
    """Raise ValueError if a checkpointing function of transformers is reentrant.

    Reentrant checkpointing runs a layer without autograd and decides by the layer's positional
    inputs whether it needs gradients. Where they need none, as under LoRA without input gradients,
    the first layer's values, which every layer reads, would silently get no gradient.
    """
    options = getattr(checkpoint_function, "keywords", None)
    # Without the option torch's default applies, which is reentrant.
    if options is not None and options.get("use_reentrant", True) in (True, None):
        raise ValueError(
            "gradient checkpointing of a value-residual model must be non-reentrant, got "
            f"use_reentrant={options.get('use_reentrant')}: reentrant checkpointing can lose the "
            "gradient of the first layer's values. Pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


class ResidualLayer:
    """A layer of any family: attention and MLP, each after a norm, added to the residual stream."""

    norm_names: tuple[str, str]
    attention_name: str

    def forward(
        self, hidden_states: Tensor, *earlier: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The residual stream (B, T, dim), and the attention's values, (B, T, Hkv, D).

        Tensors that need a gradient are positional, so that checkpointing sees them.
        """
        attention_norm, mlp_norm = (getattr(self, name) for name in self.norm_names)
        attention: Callable[..., Any] = getattr(self, self.attention_name)
        attended, _, values = attention(attention_norm(hidden_states), *earlier, **kwargs)
        hidden_states = hidden_states + attended
        mlp: Callable[[Tensor], Tensor] = self.mlp  # type: ignore[attr-defined]
        return hidden_states + mlp(mlp_norm(hidden_states)), values


class ValueResidualPreTrained:
    """The part common to inner models and models with a head."""

    # Coefficients are few and train badly in 16 bits; the kernels take float32 with any dtype.
    _keep_in_fp32_modules_strict = ("v_mix",)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (LearnedMix, DenseMix)):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        if enable:
            refuse_reentrant(kwargs.get("gradient_checkpointing_func"))
        super()._set_gradient_checkpointing(enable, **kwargs)  # type: ignore[misc]


class ValueResidualModel(ValueResidualPreTrained):
    """The part common to the inner models."""

    layers: nn.ModuleList
    config: Any
    training: bool

    def run_layers(
        self, hidden_states: Tensor, arguments: Callable[[int], dict[str, Any]], **kwargs: Any
    ) -> Tensor:
        """Run every layer, and pass the values of the first (Dense: of all) to the later ones.

        Args:
            hidden_states: (B, T, dim).
            arguments: the keyword arguments of layer i alone; kwargs are those of every layer.
        """
        earlier: tuple[Tensor, ...] = ()
        keeps_all = self.config.value_residual == "dense"
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if self.training and layer.gradient_checkpointing:
                refuse_reentrant(layer._gradient_checkpointing_func)
            hidden_states, values = layer(hidden_states, *earlier, **arguments(i), **kwargs)
            if i == 0 or keeps_all:
                earlier = (*earlier, values)
        return hidden_states


def check_one_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Raise ValueError unless exactly one of the two is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("specify exactly one of input_ids and inputs_embeds")


def positions(hidden_states: Tensor) -> Tensor:
    """The positions (1, T) of hidden_states (B, T, dim); under `context_parallel` this rank's."""
    length, device = hidden_states.shape[1], hidden_states.device
    split = across.current()
    parts = [(0, length)] if split is None else split.ranges(length)
    return torch.cat([torch.arange(a, b, device=device) for a, b in parts]).unsqueeze(0)


def check_split(config: Any, past_key_values: Any = None) -> bool:
    """Whether the model runs under `context_parallel`; ValueError where it cannot."""
    if across.current() is None:
        return False
    if config._attn_implementation != NAME:
        raise ValueError(
            f"attn_implementation must be {NAME!r} under context_parallel, got "
            f"{config._attn_implementation!r}, which attends to this rank's tokens alone"
        )
    if past_key_values is not None:
        raise ValueError("past_key_values must be None under context_parallel, got a cache")
    return True


class DecoderModel(ValueResidualModel):
    """The inner model of Llama and Qwen2."""

    embed_tokens: nn.Module
    rotary_emb: nn.Module
    norm: nn.Module

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock model's forward, with values passed between layers."""
        check_one_input(input_ids, inputs_embeds)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        split = check_split(self.config, past_key_values)
        if use_cache and past_key_values is None and not split:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = positions(hidden_states) + seen

        kinds = getattr(self.config, "layer_types", None)
        masks = attention_mask
        if not isinstance(masks, dict):
            inputs = {
                "config": self.config,
                "inputs_embeds": hidden_states,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                # Gaps in them would be read as packed sequences.
                "position_ids": None if split else position_ids,
            }
            masks = {"full_attention": create_causal_mask(**inputs)}
            if kinds is not None and "sliding_attention" in kinds:
                masks["sliding_attention"] = create_sliding_window_causal_mask(**inputs)

        hidden_states = self.run_layers(
            hidden_states,
            lambda i: {"attention_mask": masks["full_attention" if kinds is None else kinds[i]]},
            position_embeddings=self.rotary_emb(hidden_states, position_ids=position_ids),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values=past_key_values)


class EncoderModel(ValueResidualModel):
    """The inner model of ModernBERT."""

    embeddings: nn.Module
    rotary_emb: nn.Module
    final_norm: nn.Module

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock model's forward, with values passed between layers."""
        check_one_input(input_ids, inputs_embeds)
        hidden_states = self.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds)
        check_split(self.config)
        if position_ids is None:
            position_ids = positions(hidden_states)
        masks = attention_mask
        if not isinstance(masks, dict):
            inputs = {
                "config": self.config,
                "inputs_embeds": hidden_states,
                "attention_mask": attention_mask,
            }
            masks = {
                "full_attention": create_bidirectional_mask(**inputs),
                "sliding_attention": create_bidirectional_sliding_window_mask(**inputs),
            }
        kinds = self.config.layer_types
        rotary = {kind: self.rotary_emb(hidden_states, position_ids, kind) for kind in set(kinds)}
        hidden_states = self.run_layers(
            hidden_states,
            lambda i: {
                "attention_mask": masks[kinds[i]],
                "position_embeddings": rotary[kinds[i]],
            },
            **kwargs,
        )
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))
