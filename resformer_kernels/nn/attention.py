"""The attention layer of every model in `resformer_kernels.models`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from resformer_kernels._core.checks import integer, real
from resformer_kernels.attention.api import value_residual_attention
from resformer_kernels.kvcache.cache.cache import SharedValueCache
from resformer_kernels.nn.epilogue import Epilogue
from resformer_kernels.nn.rotary import apply_rotary
from resformer_kernels.nn.value_mix import LearnedMix, ValueMix, ValueSources


class ValueResidualAttention(nn.Module):
    """Multi-head self-attention over mixed values (Zhou et al., arXiv 2410.17897).

    The first layer's values are passed as a plain tensor: forward returns this layer's values with
    the output, and the caller passes the first layer's to later layers. The module stores none of
    them, so checkpointing, torch.compile and FSDP2 see every use.

    Args:
        dim: channels of the input and the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads; None: num_heads.
        head_dim: channels per head; None: dim / num_heads.
        v_mix: the mix of values; None: two learned scalars (Learnable ResFormer). The first layer
            has nothing to mix and takes `OwnValues`. With a mix that uses no values of this layer
            (`FirstValues`) the layer has no `v_proj`.
        causal: query i attends to keys up to i.
        window: (left, right) keys around each query, inclusive; -1 is unbounded.
        qk_norm: RMS-normalise each query and key head before the rotation.
        scale: multiplies q.k; None: 1 / sqrt(head_dim).
        exclusive: None; a number, 1.0 for exclusive self-attention (arXiv 2603.09078); or "learned"
            for a tanh(alpha) per head, initially 0: see `nn.epilogue.Epilogue`.
        gate: None, or a sigmoid gate on the output, from x: "head" with a number per token and
            head, "channel" with one per token, head and channel.
        projects_keys: False for a layer that attends over an earlier layer's keys, which are passed
            as a plain tensor too: it has no `k_proj` (FusedKV-Lite, arXiv 2512.03870).
        backend: passed to `value_residual_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        v_mix: ValueMix | None = None,
        causal: bool = True,
        window: tuple[int, int] = (-1, -1),
        qk_norm: bool = False,
        scale: float | None = None,
        exclusive: float | str | None = None,
        gate: str | None = None,
        projects_keys: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dim, num_heads = integer("dim", dim, 1), integer("num_heads", num_heads, 1)
        kv_heads = num_heads if num_kv_heads is None else integer("num_kv_heads", num_kv_heads, 1)
        if num_heads % kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads {kv_heads}, got {num_heads}"
            )
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    f"dim must be a multiple of num_heads {num_heads} where head_dim "
                    f"is None, got {dim}"
                )
            head_dim = dim // num_heads
        head_dim = integer("head_dim", head_dim, 1)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.causal, self.qk_norm, self.backend = causal, qk_norm, backend
        self.projects_keys = projects_keys
        left, right = window
        self.window = integer("window", left, -1), integer("window", right, -1)
        self.scale = None if scale is None else real("scale", scale)
        self.v_mix = LearnedMix() if v_mix is None else v_mix
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        if projects_keys:
            self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        if self.v_mix.projects_values:
            self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        follows = exclusive is not None or gate is not None
        self.epilogue = Epilogue(dim, num_heads, head_dim, exclusive, gate) if follows else None
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None = None,
        *later_values: Tensor,
        keys: Tensor | None = None,
        return_keys: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
        token_ids: Tensor | None = None,
        cache: SharedValueCache | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, ...]:
        """Attend.

        Args:
            x: (B, T, dim).
            v_first: the first layer's values, (B, T, Hkv, head_dim); None in the first layer.
            later_values: the values of layers 2 to n - 1, in order; for `DenseMix` only.
            keys: the keys of an earlier layer, (B, T, Hkv, head_dim), as its `return_keys` gives
                them; None where this layer projects its own.
            return_keys: also return the keys attended over, normalised and rotated.
            rotary: cos and sin, each (T, head_dim / 2) or (B, T, head_dim / 2); None: no rotation.
            token_ids: (B, T) integers, for `EmbeddingMix`.
            cache: a cache that x continues. Rotated keys and the mixed V' are appended (keys only
                where the mix is V₁ alone, and none of another layer's), and x attends over all
                cached tokens. v_first and keys hold those of the T tokens of x alone. No gradient.
            layer: this layer's index in the cache, from 0.

        Returns:
            The output (B, T, dim), and this layer's values (B, T, Hkv, head_dim), before mixing.
            A layer without `v_proj` returns v_first instead. With return_keys a third tensor, the
            keys (B, T, Hkv, head_dim).

        Raises:
            ValueError: the mix needs values or token_ids that are missing, such as v_first in a
                first layer whose mix is neither `OwnValues` nor `EmbeddingMix`; or keys are
                missing, or given to a layer with keys of its own.
            RuntimeError: the cache is full, or gradients are enabled with a cache.
        """
        self._check_keys(keys)
        q = self._rotated(self.q_proj(x), rotary)
        k = self._rotated(self.k_proj(x), rotary) if keys is None else keys
        own: Tensor | None = None
        if self.v_mix.projects_values:
            own = self.v_proj(x).unflatten(2, (-1, self.head_dim))
        earlier = () if v_first is None else (v_first, *later_values)
        read = x if self.v_mix.reads_input else None
        mixed = self.v_mix(ValueSources(own, earlier, read, token_ids))
        # softcap is passed explicitly: torch.compile(dynamic=True) turns a float default into a
        # graph input, which fails inside a checkpoint.
        options: dict[str, Any] = {
            "scale": self.scale,
            "causal": self.causal,
            "window": self.window,
            "backend": self.backend,
        }
        if self.epilogue is not None:
            options |= self.epilogue(x, q)
        if cache is None:
            out = value_residual_attention(q, k, *mixed, softcap=0.0, **options)
        else:
            new_keys = k if self.projects_keys else None
            out = cache.attend(layer, q, new_keys, mixed.cached(), **options)
        values = own if own is not None else earlier[0]
        result = self.o_proj(out.flatten(2)), values
        return (*result, k) if return_keys else result

    def _check_keys(self, keys: Tensor | None) -> None:
        if self.projects_keys and keys is not None:
            raise ValueError(
                "keys must be None, as this layer projects its own, got a tensor of shape "
                f"{tuple(keys.shape)}"
            )
        if not self.projects_keys and keys is None:
            raise ValueError(
                "keys must be an earlier layer's, (B, T, Hkv, head_dim), as this layer projects "
                "none, got None"
            )

    def _rotated(self, projected: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries or keys, (B, T, heads, head_dim), normalised and rotated."""
        heads = projected.unflatten(2, (-1, self.head_dim))
        if self.qk_norm:
            heads = F.rms_norm(heads, (self.head_dim,))
        return heads if rotary is None else apply_rotary(heads, *rotary)
