"""The peer: the same layer with PyTorch's own attention.

The mix is made of PyTorch operations, in the dtype of the values as public training code does it,
and `scaled_dot_product_attention` attends over the result. Everything else is the package's layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels import SharedValueCache
from resformer_kernels.models import LanguageModel
from resformer_kernels.nn import ValueResidualAttention
from resformer_kernels.nn.value_mix import MixedValues, ValueSources
from training import FlagError


def mixed_values(given: MixedValues) -> Tensor:
    """V', (B, T, Hkv, D), for the arguments of `value_residual_attention`."""
    if given.v is None or given.v_first is None:
        values = given.v if given.v_first is None else given.v_first
        assert values is not None
        return values
    own, first = given.lambda_v, given.lambda_first
    if isinstance(own, Tensor):
        own = own.to(given.v.dtype)
    if isinstance(first, Tensor):
        first = first.to(given.v.dtype)
    return own * given.v + first * given.v_first


class SDPAAttention(ValueResidualAttention):
    """`ValueResidualAttention` without the package's kernels, for training."""

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
        """Attend; arguments and results are those of `ValueResidualAttention`, without a cache."""
        if cache is not None:
            raise RuntimeError("SDPAAttention has no cache: it is for training")
        del layer  # the cache's
        q = self._rotated(self.q_proj(x), rotary)
        k = self._rotated(self.k_proj(x), rotary) if keys is None else keys
        own: Tensor | None = None
        if self.v_mix.projects_values:
            own = self.v_proj(x).unflatten(2, (-1, self.head_dim))
        earlier = () if v_first is None else (v_first, *later_values)
        v = mixed_values(self.v_mix(ValueSources(own, earlier, x, token_ids)))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self._window_mask(x),
            is_causal=self.window[0] < 0,
            scale=self.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        values = own if own is not None else earlier[0]
        result = self.o_proj(out.transpose(1, 2).flatten(2)), values
        return (*result, k) if return_keys else result

    def _window_mask(self, x: Tensor) -> Tensor | None:
        """What a layer with a window sees, (T, T)."""
        if self.window[0] < 0:
            return None
        places = torch.arange(x.shape[1], device=x.device)
        distance = places[:, None] - places
        return (distance >= 0) & (distance <= self.window[0])


def use_sdpa(model: LanguageModel) -> None:
    """Make every layer of a model attend with PyTorch's attention. FlagError where the model has
    exclusive attention or output gates, which PyTorch's lacks."""
    if model.config.exclusive is not None or model.config.gate is not None:
        raise FlagError(
            "--attention sdpa and --compare-sdpa need a model without the fields exclusive and gate"
        )
    for module in list(model.modules()):
        if isinstance(module, ValueResidualAttention):
            # The same parameters under the same names, with another forward: what FSDP2 does to a
            # module, too.
            module.__class__ = SDPAAttention
