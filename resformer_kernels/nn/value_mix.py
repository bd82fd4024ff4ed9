"""The values that a layer attends over: its own, the first layer's, or a mix.

Each mix is a module, held by the attention layer as `v_mix`, so that optimisers, PEFT and
initialisers find λ under a name and the value projection stays an ordinary Linear. From the values
of this layer and of earlier ones a mix returns the arguments of `value_residual_attention`; a mix
that the kernel can fuse computes nothing here.

`lambda_v` multiplies this layer's values and `lambda_first` the first layer's. Variants are named
as in Zhou et al., "Value Residual Learning", arXiv 2410.17897.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resformer_kernels._core.checks import integer, real
from resformer_kernels.mix import mix_value_embedding, mix_values
from resformer_kernels.nn.local import local_parameter
from resformer_kernels.nn.state import AdaptsCheckpoint


class ValueSources(NamedTuple):
    """The inputs of a mix. Values are (B, T, Hkv, Dv)."""

    own: Tensor | None
    """This layer's values; None where the layer projects none."""
    earlier: tuple[Tensor, ...]
    """The values of earlier layers, the first layer's first; empty in the first layer."""
    x: Tensor | None
    """The layer's input, (B, T, dim), for gates; None where the mix does not read it."""
    token_ids: Tensor | None
    """(B, T), for value embeddings."""


class MixedValues(NamedTuple):
    """Arguments of `value_residual_attention`, under its names."""

    v: Tensor | None
    v_first: Tensor | None = None
    lambda_v: float | Tensor = 1.0
    lambda_first: float | Tensor = 1.0

    def cached(self) -> Tensor | None:
        """The mixed values V', for a cache; None for V₁ alone, which the first layer has cached."""
        if self.v is None or self.v_first is None:
            return self.v
        return mix_values((self.v, self.v_first), (self.lambda_v, self.lambda_first))


def _own(sources: ValueSources, mix: nn.Module) -> Tensor:
    if sources.own is None:
        raise ValueError(f"{type(mix).__name__} needs this layer's values, got None")
    return sources.own


def _first(sources: ValueSources, mix: nn.Module) -> Tensor:
    if not sources.earlier:
        raise ValueError(
            f"{type(mix).__name__} needs v_first, the first layer's values (B, T, Hkv, Dv), got "
            "none; the first layer itself takes OwnValues"
        )
    return sources.earlier[0]


class ValueMix(nn.Module):
    """Base class of the mixes."""

    projects_values = True
    """Whether the layer has a value projection."""
    reads_all_layers = False
    """Whether the mix takes the values of every earlier layer, not only the first layer's."""
    reads_input = True
    """Whether the mix reads the layer's input. FSDP2 adds a gradient of zero to every input of a
    module that it shards, and a plain one is no zero of the DTensor that tensor parallelism makes
    of this."""

    def forward(self, sources: ValueSources) -> MixedValues:
        """The arguments for `value_residual_attention`."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def head_axis(self, parameter: str) -> int | None:
        """The axis that runs over KV heads, of a parameter that is read beside values; None where
        all heads share it. Tensor parallelism splits it there, or replicates it."""
        del parameter
        return None


class OwnValues(ValueMix):
    """This layer's values alone: a plain Transformer, and the first layer of every variant."""

    reads_input = False

    def forward(self, sources: ValueSources) -> MixedValues:
        """V' = V."""
        return MixedValues(_own(sources, self))


class FirstValues(ValueMix):
    """The first layer's values alone: SVFormer. The layer has no value projection."""

    projects_values = False
    reads_input = False

    def forward(self, sources: ValueSources) -> MixedValues:
        """V' = V₁."""
        return MixedValues(None, _first(sources, self))


class FixedMix(ValueMix):
    """V' = lambda_v · V + lambda_first · V₁ with two constants: Identity, Constant, Sparse."""

    reads_input = False

    def __init__(self, lambda_v: float, lambda_first: float) -> None:
        super().__init__()
        self.lambda_v = float(real("lambda_v", lambda_v))
        self.lambda_first = float(real("lambda_first", lambda_first))

    def extra_repr(self) -> str:
        """The constants."""
        return f"lambda_v={self.lambda_v}, lambda_first={self.lambda_first}"

    def forward(self, sources: ValueSources) -> MixedValues:
        """Leave the mix to the kernel."""
        return MixedValues(
            _own(sources, self), _first(sources, self), self.lambda_v, self.lambda_first
        )


class LearnedMix(AdaptsCheckpoint, ValueMix):
    """V' = lambda_v · V + lambda_first · V₁ with learned coefficients, float32.

    Args:
        num_kv_heads: None for one pair of scalars, of shape (1,) (the paper's Learnable); a number
            for one pair per KV head, of shape (Hkv, 1) (this package's Learnable-Plus).
        lambda_v: initial value.
        lambda_first: initial value.

    State dicts in which the scalars have shape () load too.
    """

    reads_input = False

    def __init__(
        self,
        num_kv_heads: int | None = None,
        *,
        lambda_v: float = 0.5,
        lambda_first: float = 0.5,
    ) -> None:
        super().__init__()
        # FSDP2 shards the first axis, and refuses a parameter without one.
        shape = (1,) if num_kv_heads is None else (integer("num_kv_heads", num_kv_heads, 1), 1)
        self.initial = (
            float(real("lambda_v", lambda_v)),
            float(real("lambda_first", lambda_first)),
        )
        self.lambda_v = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.lambda_first = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both coefficients to their initial values."""
        nn.init.constant_(self.lambda_v, self.initial[0])
        nn.init.constant_(self.lambda_first, self.initial[1])

    def adapt_checkpoint(self, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Give scalars of shape () the shape (1,)."""
        del errors
        for name in ("lambda_v", "lambda_first"):
            given = state.get(prefix + name)
            if isinstance(given, Tensor) and given.dim() == 0:
                state[prefix + name] = given.detach().reshape(1)

    def head_axis(self, parameter: str) -> int | None:
        """The first of a pair per head."""
        return 0 if self.get_parameter(parameter).dim() == 2 else None

    def extra_repr(self) -> str:
        """The coefficients' shape."""
        return f"shape={tuple(self.lambda_v.shape)}"

    def forward(self, sources: ValueSources) -> MixedValues:
        """Leave the mix to the kernel, which also computes the coefficients' gradients."""
        own, first = _own(sources, self), _first(sources, self)
        # Copies: FSDP2 frees a gathered parameter when the forward of its module returns.
        lambda_v, lambda_first = (
            local_parameter(each, own).clone() for each in (self.lambda_v, self.lambda_first)
        )
        return MixedValues(own, first, lambda_v, lambda_first)


class DenseMix(ValueMix):
    """V'ₙ = Σᵢ λₙᵢ Vᵢ over this layer and every earlier one, λ learned: Dense-ResFormer.

    Args:
        num_sources: n, including this layer. Each λ starts at 1/n, Learnable's 0.5 at n = 2.
    """

    reads_all_layers = True
    reads_input = False

    def __init__(self, num_sources: int) -> None:
        super().__init__()
        num_sources = integer("num_sources", num_sources, 2)
        self.lambda_layers = nn.Parameter(torch.empty(num_sources, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give every layer the same weight."""
        nn.init.constant_(self.lambda_layers, 1.0 / self.lambda_layers.numel())

    def forward(self, sources: ValueSources) -> MixedValues:
        """Mix all sources in one fused pass, in layer order, this layer's values last."""
        values = (*sources.earlier, _own(sources, self))
        if len(values) != self.lambda_layers.numel():
            raise ValueError(
                f"DenseMix needs the values of {self.lambda_layers.numel() - 1} earlier layers, "
                f"got {len(sources.earlier)}"
            )
        coefficients = local_parameter(self.lambda_layers, values[-1]).unbind()
        return MixedValues(mix_values(values, coefficients))


class EmbeddingMix(ValueMix):
    """V' = V + cσ(W x) · E[token]: nanochat's gated value embedding, one gate per KV head.

    The gate reads the first `gate_channels` channels of the layer's input. W starts at zero, and
    so every gate at c / 2.

    Args:
        vocab_size: rows of the table E, (vocab_size, Hkv, Dv).
        num_kv_heads: Hkv.
        head_dim: Dv.
        gate_channels: input channels that the gate reads.
        gate_range: c.
    """

    def __init__(
        self,
        vocab_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        gate_channels: int,
        gate_range: float = 3.0,
    ) -> None:
        super().__init__()
        sizes = (("vocab_size", vocab_size), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim))
        shape = [integer(name, size, 1) for name, size in sizes]
        self.gate_range = float(real("gate_range", gate_range))
        self.gate_channels = integer("gate_channels", gate_channels, 1)
        self.table = nn.Parameter(torch.empty(shape))
        self.gate_proj = nn.Linear(self.gate_channels, shape[1], bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table at the scale of values; set every gate to half its range."""
        nn.init.normal_(self.table, std=0.5)
        nn.init.zeros_(self.gate_proj.weight)

    def head_axis(self, parameter: str) -> int | None:
        """The table's second."""
        del parameter
        return 1

    def forward(self, sources: ValueSources) -> MixedValues:
        """Mix without materialising the gathered rows."""
        if sources.token_ids is None:
            raise ValueError("EmbeddingMix needs token_ids, (B, T) integers, got None")
        if sources.x is None:
            raise ValueError("EmbeddingMix needs x, the layer's input (B, T, dim), got None")
        v = _own(sources, self)
        gate = self.gate_range * torch.sigmoid(self.gate_proj(sources.x[..., : self.gate_channels]))
        table = local_parameter(self.table, v)
        return MixedValues(mix_value_embedding(v, table, sources.token_ids, gate.unsqueeze(-1)))
