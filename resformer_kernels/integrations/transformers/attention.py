"""Attention layers of transformers whose values are mixed with the first layer's, or shared.

Mixing and sharing happen here, in `forward`. The model's attention function gets the mixed values,
so replacing that function cannot drop the residual. The first layer's values are arguments and
results, plain tensors, so that checkpointing, sharding and compilers see every use of them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from resformer_kernels.integrations.transformers.cache import ResFormerCache
from resformer_kernels.integrations.transformers.in_place import hooks, offloads
from resformer_kernels.integrations.transformers.kernel import (
    NAME,
    is_causal_without_mask,
    read_mask,
    scoring,
)
from resformer_kernels.integrations.transformers.masks import KeyMask
from resformer_kernels.nn import ValueMix
from resformer_kernels.nn.value_mix import ValueSources

Attended = tuple[Tensor, Any, Tensor]
"""The output (B, T, dim), attention weights or None, and values for later layers, (B, T, H, D)."""


class ValueResidualAttention:
    """The part common to all families; a base class placed before the family's own class."""

    v_mix: ValueMix
    projects_values: bool
    """Whether the layer has a value projection, which a layer over shared values has not."""
    returns_cached_values: bool
    """Whether later layers get the cached values: true in the first layer of an SVFormer."""
    rotate: Callable[..., tuple[Tensor, Tensor]]
    eager: Callable[..., Any]
    config: Any
    training: bool
    layer_idx: int
    head_dim: int
    attention_dropout: float

    def set_mix(self, v_mix: ValueMix, returns_cached_values: bool) -> None:
        """Set the mix; called once, on an attention layer with all weights of the stock one."""
        self.v_mix = v_mix
        self.projects_values = v_mix.projects_values
        self.returns_cached_values = returns_cached_values
        if not self.projects_values:
            self.drop_value_projection()

    def drop_value_projection(self) -> None:
        """Remove the weights of this layer's value projection."""
        raise NotImplementedError(f"{type(self).__name__} must define drop_value_projection")

    def mixed_values(self, own: Tensor | None, earlier: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """V', (B, T, H, D), of the tokens of x; with shared values, of all tokens so far."""
        mixed = self.v_mix(ValueSources(own, earlier, x, None))
        values: Tensor | None = mixed.cached()
        return mixed.v_first if values is None else values

    def options(self) -> dict[str, Any]:
        """The arguments of every attention function that are not tensors."""
        return {
            "dropout": self.attention_dropout if self.training else 0.0,
            "scaling": getattr(self, "scaling", self.head_dim**-0.5),
            "sliding_window": getattr(self, "sliding_window", None),
        }

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """The model's attention function of (B, H, T, D): (B, T, dim), and weights or None."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, type(self).eager
        )
        out, weights = function(self, q, k, v, mask, **self.options(), **kwargs)
        return out.reshape(*out.shape[:2], -1).contiguous(), weights


class DecoderAttention(ValueResidualAttention):
    """Attention of Llama and Qwen2: separate projections and a cache."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def drop_value_projection(self) -> None:
        """Delete `v_proj`."""
        del self.v_proj

    def forward(
        self,
        hidden_states: Tensor,
        *earlier: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Attended:
        """Attend.

        Args:
            hidden_states: (B, T, dim).
            earlier: values of earlier layers, (B, T, Hkv, D), the first layer's first; with
                shared values and a cache, the first layer's for all tokens so far.
            position_embeddings: cosines and sines of the family's rotary embedding.
            attention_mask: as the model's attention function takes it.
            past_key_values: a cache of transformers. V' of the new tokens is appended to it, or
                values of width zero where the layer shares values.
            kwargs: passed to the attention function.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        k = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        own = self.v_proj(hidden_states).view(heads) if self.projects_values else None
        q, k = type(self).rotate(q, k, *position_embeddings)
        v = self.mixed_values(own, earlier, hidden_states).transpose(1, 2)
        if self.attends_in_cache(past_key_values, attention_mask):
            new = v if self.projects_values else k[..., :0]
            out = self.attend_in_cache(past_key_values, q, k, new, attention_mask, **kwargs)
            return self.o_proj(out.flatten(2)), None, v.transpose(1, 2) if own is None else own
        if past_key_values is not None:
            k, v = self.append_to_cache(past_key_values, k, v)
        out, weights = self.attend(q, k, v, attention_mask, **kwargs)
        returned = v.transpose(1, 2) if own is None or self.returns_cached_values else own
        return self.o_proj(out), weights, returned

    def attends_in_cache(self, cache: Any, mask: Any) -> bool:
        """Whether to attend in the cache: a `ResFormerCache`, with our kernel, without dropout and
        without a mask that is neither keys nor a window."""
        return (
            isinstance(cache, ResFormerCache)
            and self.config._attn_implementation == NAME
            and not self.options()["dropout"]
            and (mask is None or isinstance(mask, KeyMask))
        )

    def attend_in_cache(
        self, cache: ResFormerCache, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> Tensor:
        """Append keys and values to the cache and attend there, (B, T, Hq, D)."""
        causal = is_causal_without_mask(self, kwargs.get("is_causal"), q.shape[2])
        length = q.shape[2] if mask is None else mask.shape[3]
        seen = read_mask(mask, q.shape[2], length, causal)
        options = scoring(**self.options(), **kwargs)
        return cache.attend(
            self.layer_idx, q, k, v, seen.keys, causal=False, window=seen.window, **options
        )

    def append_to_cache(self, cache: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append to the cache; return keys and values of all tokens so far, (B, Hkv, T, D)."""
        if self.projects_values:
            keys, values = cache.update(k, v, self.layer_idx)
            return keys, values
        _check_keys_alone(cache, self.layer_idx)
        keys, values = cache.update(k, k[..., :0], self.layer_idx)
        if values.shape[-1]:
            return keys, values  # A `ResFormerCache` returns the shared values itself.
        if keys.shape[-2] != v.shape[-2]:
            raise ValueError(
                f"layer {self.layer_idx} shares the first layer's values, of which the cache "
                f"holds {v.shape[-2]}, but has {keys.shape[-2]} keys: a cache whose windows differ "
                "between this layer and the first cannot share values between them (sliding beside "
                "full attention); generate with use_cache=False, or convert layers of one kind only"
            )
        return keys, v


def _check_keys_alone(cache: Any, layer: int) -> None:
    """Raise if a cache layer cannot hold keys without values."""
    layers = getattr(cache, "layers", ())
    if layer >= len(layers):
        return
    if hasattr(layers[layer], "_quantize"):
        raise ValueError(
            f"layer {layer} shares the first layer's values and caches keys alone, which "
            f"{type(layers[layer]).__name__} cannot hold: use a cache that is not quantised"
        )
    values = getattr(layers[layer], "values", None)
    if isinstance(values, Tensor) and values.dim() == 4 and values.shape[-1]:
        raise ValueError(
            f"layer {layer} shares the first layer's values, but the cache holds values for it, "
            f"(B, Hkv, T, D) = {tuple(values.shape)}: SVFormer cannot use values of a prefix in "
            "every layer (prefix tuning)"
        )


class EncoderAttention(ValueResidualAttention):
    """Attention of ModernBERT: one projection for queries, keys and values, and no cache."""

    Wqkv: nn.Linear
    Wo: nn.Module
    out_drop: nn.Module
    deterministic_flash_attn: bool

    def drop_value_projection(self) -> None:
        """Reduce `Wqkv` to the rows of queries and keys.

        TypeError where it has none to cut, as when quantised or pruned, or they are elsewhere.
        """
        if type(self.Wqkv) is not nn.Linear:
            raise TypeError(f"Wqkv must be a torch.nn.Linear, got {type(self.Wqkv).__name__}")
        tensors = dict(chain(self.Wqkv.named_parameters(), self.Wqkv.named_buffers()))
        if not tensors.keys() <= {"weight", "bias"}:
            raise TypeError(f"Wqkv must hold a weight and a bias alone, got {sorted(tensors)}")
        if any(map(offloads, hooks(self.Wqkv))):
            raise TypeError(
                "Wqkv's weight is offloaded by a hook of accelerate, and cannot be split there: "
                "convert the model before it is dispatched"
            )
        self.Wqkv.out_features = rows = 2 * self.Wqkv.out_features // 3
        for name, parameter in list(self.Wqkv.named_parameters()):
            part = nn.Parameter(parameter.detach()[:rows].clone(), parameter.requires_grad)
            setattr(self.Wqkv, name, part)

    def forward(
        self,
        hidden_states: Tensor,
        *earlier: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Attended:
        """Attend, with the arguments of `DecoderAttention`."""
        parts = 3 if self.projects_values else 2
        heads = (*hidden_states.shape[:-1], parts, -1, self.head_dim)
        q, k, *own = self.Wqkv(hidden_states).view(heads).unbind(dim=-3)
        q, k = type(self).rotate(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        v = self.mixed_values(own[0] if own else None, earlier, hidden_states)
        kwargs["deterministic"] = self.deterministic_flash_attn
        out, weights = self.attend(q, k, v.transpose(1, 2), attention_mask, **kwargs)
        return self.out_drop(self.Wo(out)), weights, own[0] if own else v
