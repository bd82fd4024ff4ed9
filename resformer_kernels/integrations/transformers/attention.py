"""Attention layers of transformers whose values are mixed with the first layer's, or shared.

Mixing and sharing happen here, in `forward`, and the attention function that a model has chosen
gets plain values: swapping it cannot drop the residual. The first layer's values come in and go
out as plain tensors, so that checkpointing, sharding and compilers see every use of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from resformer_kernels.integrations.transformers import kernel
from resformer_kernels.integrations.transformers.cache import ResFormerCache
from resformer_kernels.mix import mix_values
from resformer_kernels.nn import ValueMix
from resformer_kernels.nn.value_mix import ValueSources

Attended = tuple[Tensor, Any, Tensor]
"""The output (B, T, dim), the attention weights or None, and the values handed on, (B, T, H, D)."""


class ValueResidualAttention:
    """What every family's attention shares; mixed in before the family's own class."""

    v_mix: ValueMix
    projects_values: bool
    """Whether the layer has a value projection: not one that attends over shared values."""
    hands_on_history: bool
    """Whether what is handed on are the cached values: the first layer, where others share."""
    rotate: Callable[..., tuple[Tensor, Tensor]]
    eager: Callable[..., Any]
    config: Any
    training: bool
    layer_idx: int
    head_dim: int
    attention_dropout: float

    @staticmethod
    def check_value_projection(stock: Any) -> None:
        """Raise where the value projection of a stock attention layer cannot be dropped."""

    def adopt(self, v_mix: ValueMix, hands_on_history: bool) -> None:
        """Take the mix; called once, on an attention layer that is still the family's own."""
        self.v_mix = v_mix
        self.projects_values = v_mix.projects_values
        self.hands_on_history = hands_on_history
        if not self.projects_values:
            self.drop_value_projection()

    def drop_value_projection(self) -> None:
        """Forget the weights that make this layer's values."""
        raise NotImplementedError(f"{type(self).__name__} must define drop_value_projection")

    def mixed_values(self, own: Tensor | None, earlier: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """V', (B, T, H, D), of the tokens of x; over shared values, of all tokens so far."""
        mixed = self.v_mix(ValueSources(own, earlier, x, None))
        if mixed.v_first is None:
            return mixed.v
        if mixed.v is None:
            return mixed.v_first
        return mix_values((mixed.v, mixed.v_first), (mixed.lambda_v, mixed.lambda_first))

    def options(self) -> dict[str, Any]:
        """What every attention function is told beside tensors."""
        return {
            "dropout": self.attention_dropout if self.training else 0.0,
            "scaling": getattr(self, "scaling", self.head_dim**-0.5),
            "sliding_window": getattr(self, "sliding_window", None),
        }

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """The chosen attention function on (B, H, T, D): (B, T, dim), and weights or None."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, type(self).eager
        )
        out, weights = function(
            self,
            q,
            k,
            v,
            mask,
            **self.options(),
            **kwargs,
        )
        return out.reshape(*out.shape[:2], -1).contiguous(), weights


class DecoderAttention(ValueResidualAttention):
    """Llama, Qwen2: separate projections and a cache."""

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
                shared values and a cache the first layer's of all tokens so far.
            position_embeddings: cosines and sines of the family's rotary embedding.
            attention_mask: as the chosen attention function takes it.
            past_key_values: a cache of transformers. It is given V' of the new tokens; a layer
                that shares values gives it values of width zero.
            kwargs: go to the attention function.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        k = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        own = self.v_proj(hidden_states).view(heads) if self.projects_values else None
        q, k = type(self).rotate(q, k, *position_embeddings)
        v = self.mixed_values(own, earlier, hidden_states).transpose(1, 2)
        if self.attends_in_cache(past_key_values, attention_mask):
            new = v if self.projects_values else k[..., :0]
            options = kernel.options_of(self, **self.options(), **kwargs)  # type: ignore[arg-type]
            out = past_key_values.attend(self.layer_idx, q, k, new, attention_mask, **options)
            return self.o_proj(out.flatten(2)), None, v.transpose(1, 2) if own is None else own
        if past_key_values is not None:
            k, v = self.remember(past_key_values, k, v)
        out, weights = self.attend(q, k, v, attention_mask, **kwargs)
        handed_on = v.transpose(1, 2) if own is None or self.hands_on_history else own
        return self.o_proj(out), weights, handed_on

    def attends_in_cache(self, cache: Any, mask: Any) -> bool:
        """Whether the cache attends itself: ours, beside our kernel, with a mask of lengths."""
        return (
            isinstance(cache, ResFormerCache)
            and self.config._attn_implementation == kernel.NAME
            and (mask is None or mask.dim() == 2)
        )

    def remember(self, cache: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append to the cache; the keys and values of all tokens so far, (B, Hkv, T, D)."""
        if self.projects_values:
            keys, values = cache.update(k, v, self.layer_idx)
            return keys, values
        _check_keys_alone(cache, self.layer_idx)
        keys, values = cache.update(k, k[..., :0], self.layer_idx)
        if values.shape[-1]:
            return keys, values  # A cache that knows of sharing gives back what is shared.
        if keys.shape[-2] != v.shape[-2]:
            raise ValueError(
                f"layer {self.layer_idx} shares the first layer's values, of which the cache "
                f"holds {v.shape[-2]}, beside {keys.shape[-2]} keys: a cache that keeps another "
                "window in this layer than in the first cannot share values between them "
                "(sliding beside full attention); generate with use_cache=False, or convert "
                "layers of one kind only"
            )
        return keys, v


def _check_keys_alone(cache: Any, layer: int) -> None:
    """Refuse a cache whose layer cannot hold keys without values."""
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
            f"layer {layer} shares the first layer's values, but the cache brings values of its "
            "own for it, (B, Hkv, T, D) = "
            f"{tuple(values.shape)}: SVFormer has no place for a prefix a layer (prefix tuning)"
        )


class EncoderAttention(ValueResidualAttention):
    """ModernBERT: one projection for queries, keys and values, and no cache."""

    Wqkv: nn.Linear
    Wo: nn.Module
    out_drop: nn.Module
    deterministic_flash_attn: bool

    @staticmethod
    def check_value_projection(stock: Any) -> None:
        """TypeError where `Wqkv` has no rows to choose from, as when quantised."""
        if type(stock.Wqkv) is not nn.Linear:
            raise TypeError(f"Wqkv must be a torch.nn.Linear, got {type(stock.Wqkv).__name__}")

    def drop_value_projection(self) -> None:
        """Keep the rows of `Wqkv` that make queries and keys, under its name."""
        whole = self.Wqkv
        rows = 2 * whole.out_features // 3
        kept = nn.Linear(
            whole.in_features,
            rows,
            bias=whole.bias is not None,
            device=whole.weight.device,
            dtype=whole.weight.dtype,
        )
        for name, parameter in whole.named_parameters():
            part = nn.Parameter(parameter.detach()[:rows].clone(), parameter.requires_grad)
            setattr(kept, name, part)
        self.Wqkv = kept

    def forward(
        self,
        hidden_states: Tensor,
        *earlier: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Attended:
        """Attend; arguments as those of `DecoderAttention`."""
        parts = 3 if self.projects_values else 2
        heads = (*hidden_states.shape[:-1], parts, -1, self.head_dim)
        q, k, *own = self.Wqkv(hidden_states).view(heads).unbind(dim=-3)
        q, k = type(self).rotate(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        v = self.mixed_values(own[0] if own else None, earlier, hidden_states)
        kwargs["deterministic"] = self.deterministic_flash_attn
        out, weights = self.attend(q, k, v.transpose(1, 2), attention_mask, **kwargs)
        return self.out_drop(self.Wo(out)), weights, own[0] if own else v
