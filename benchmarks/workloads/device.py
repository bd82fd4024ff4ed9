"""Attention to time on a GPU: ours beside torch's SDPA, FlexAttention and FlashAttention 3.

Every contestant mixes and attends, on the same tensors. Peers mix in one pass that torch.compile
makes; FlexAttention's mix is compiled along with it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from resformer_kernels import value_residual_attention
from resformer_kernels.bench.timing import OURS, Call, Unavailable
from resformer_kernels.bench.workloads import (
    attended_pairs,
    compiled,
    require_kernel,
    timed_call,
)

SDPA_FLASH = "SDPA FlashAttention-2"
SDPA_CUDNN = "SDPA cuDNN"
FLEX = "FlexAttention"
FA3 = "FlashAttention-3"

_BACKWARD_FLOPS = 2.5
_FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")


@dataclass(frozen=True)
class DeviceAttention:
    """Self-attention over V' = λ_v V + λ_first V₁, both λ learnable scalars."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: torch.dtype
    direction: str
    """"forward" or "backward"."""
    causal: bool
    device: str = "cuda"
    flex: bool = False
    """Whether FlexAttention takes part: it compiles anew for each shape."""

    @property
    def name(self) -> str:
        """Shape, mask, dtype and direction."""
        heads = f"H{self.heads}"
        if self.heads != self.kv_heads:
            heads = f"Hq{self.heads} Hkv{self.kv_heads}"
        mask = "causal" if self.causal else "full"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"B{self.batch} {heads} T{self.length} D{self.head_dim}"
        return f"attention {self.direction} {shape} {mask} {dtype}"

    @property
    def group(self) -> str:
        """ "attention" and the direction."""
        return f"attention {self.direction}"

    @property
    def flops(self) -> int:
        """Of the attended pairs alone."""
        pairs = attended_pairs(self.length, None) if self.causal else self.length**2
        forward = 4 * self.batch * self.heads * pairs * self.head_dim
        return forward if self.direction == "forward" else int(_BACKWARD_FLOPS * forward)

    @property
    def bytes(self) -> int:
        """Each tensor once: q, out, k, v, v_first; backward also grad_out and the gradients."""
        per_head = self.batch * self.length * self.head_dim * self.dtype.itemsize
        forward = per_head * (2 * self.heads + 3 * self.kv_heads)
        return forward if self.direction == "forward" else 2 * forward

    def makers(self) -> dict[str, Callable[[], Call]]:
        """What makes each contestant, all on the same tensors.

        A call returns out (B, T, H, D), or the gradients of q, k, v, v_first and both λ. A maker
        raises `Unavailable` where this machine lacks what it needs.
        """
        leaves, grad = self._tensors()
        attends: dict[str, Callable[..., Tensor]] = {
            SDPA_FLASH: functools.partial(self._sdpa, SDPBackend.FLASH_ATTENTION),
            SDPA_CUDNN: functools.partial(self._sdpa, SDPBackend.CUDNN_ATTENTION),
            FA3: self._fa3,
        }
        if self.flex:
            attends[FLEX] = self._flex

        def ours() -> Call:
            require_kernel(value_residual_attention, *leaves, causal=self.causal)
            attend = functools.partial(value_residual_attention, *leaves, causal=self.causal)
            return timed_call(attend, leaves, self.direction, grad)

        peers = {
            name: functools.partial(
                timed_call, functools.partial(attend, *leaves), leaves, self.direction, grad
            )
            for name, attend in attends.items()
        }
        return {OURS: ours, **peers}

    def _tensors(self) -> tuple[list[Tensor], Tensor]:
        """(q, k, v, v_first, lambda_v, lambda_first; the output's gradient), the same each time."""
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(heads: int) -> Tensor:
            shape = (self.batch, self.length, heads, self.head_dim)
            return torch.randn(shape, device=self.device, generator=generator).to(self.dtype)

        tensors = [normal(heads) for heads in (self.heads, *(self.kv_heads,) * 3)]
        lambdas = [torch.tensor(0.5, device=self.device) for _ in range(2)]
        return [*tensors, *lambdas], normal(self.heads)

    def _sdpa(
        self, kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, v_first: Tensor, *lambdas: Tensor
    ) -> Tensor:
        mixed = peer_mix(v, v_first, *lambdas)
        q, k, mixed = (x.transpose(1, 2) for x in (q, k, mixed))
        grouped = self.heads != self.kv_heads
        with sdpa_kernel([kernel]):
            out = F.scaled_dot_product_attention(
                q, k, mixed, is_causal=self.causal, enable_gqa=grouped
            )
        return out.transpose(1, 2)

    def _fa3(self, q: Tensor, k: Tensor, v: Tensor, v_first: Tensor, *lambdas: Tensor) -> Tensor:
        attend = _flash_attention_3(self.direction)
        found = attend(q, k, peer_mix(v, v_first, *lambdas), causal=self.causal)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    def _flex(self, *leaves: Tensor) -> Tensor:
        mask = _block_mask(self.length, self.device) if self.causal else None
        return _compiled_flex()(*leaves, mask, self.heads != self.kv_heads)


def _mix(v: Tensor, v_first: Tensor, lambda_v: Tensor, lambda_first: Tensor) -> Tensor:
    return (lambda_v * v.float() + lambda_first * v_first.float()).to(v.dtype)


def peer_mix(v: Tensor, v_first: Tensor, lambda_v: Tensor, lambda_first: Tensor) -> Tensor:
    """The peers' V': one compiled pass on a GPU, an expression of PyTorch's elsewhere."""
    mix = _compiled_mix() if v.is_cuda else _mix
    # One shape, and so one compilation, for all cases of a size.
    return mix(v.flatten(), v_first.flatten(), lambda_v, lambda_first).view_as(v)


@functools.cache
def _compiled_mix() -> Callable[..., Tensor]:
    return compiled(_mix)


def _mix_and_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v_first: Tensor,
    lambda_v: Tensor,
    lambda_first: Tensor,
    mask: Any,
    grouped: bool,
) -> Tensor:
    mixed = _mix(v, v_first, lambda_v, lambda_first)
    q, k, mixed = (x.transpose(1, 2) for x in (q, k, mixed))
    out: Any = flex_attention(q, k, mixed, block_mask=mask, enable_gqa=grouped)
    result: Tensor = out.transpose(1, 2)
    return result


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return compiled(_mix_and_flex)


def _causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@functools.lru_cache(maxsize=1)
def _block_mask(length: int, device: str) -> Any:
    return create_block_mask(_causal, None, None, length, length, device=device)


def _flash_attention_3(direction: str) -> Callable[..., Any]:
    missing = []
    for name in _FA3_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            missing.append(str(error))
            continue
        if direction == "backward" and name == "fa3_fwd_interface":
            missing.append(f"{name} has no backward")
            continue
        attend: Callable[..., Any] = module.flash_attn_func
        return attend
    raise Unavailable("; ".join(missing))
