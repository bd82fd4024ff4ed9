"""Attention to time on a GPU: ours beside torch's SDPA, FlexAttention, FlashAttention 3 and 4.

Every contestant mixes and attends, on equal tensors. Peers mix in one pass that torch.compile
makes; FlexAttention's mix is compiled along with it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.workloads.common import compiled, require_kernel
from resformer_kernels import value_residual_attention
from resformer_kernels.bench.attention import AttentionBenchmark
from resformer_kernels.bench.timing import Call, Unavailable, timed_call

SDPA_FLASH = "SDPA FlashAttention-2"
SDPA_CUDNN = "SDPA cuDNN"
FLEX = "FlexAttention"
FA3 = "FlashAttention-3"
FA4 = "FlashAttention-4"

DEVICE_PEERS = (SDPA_FLASH, SDPA_CUDNN, FA3, FA4)
"""Peers that compile nothing but the mix; FlexAttention compiles anew for each shape."""

_MODULES = {FA3: ("flash_attn_interface", "fa3_fwd_interface"), FA4: ("flash_attn.cute",)}
"""Where each is imported from."""


def _sdpa(kernel: SDPBackend, case: AttentionBenchmark, leaves: list[Tensor]) -> Tensor:
    q, k, mixed = (x.transpose(1, 2) for x in (*leaves[:2], peer_mix(*leaves[2:])))
    grouped = case.heads != case.kv_heads
    with sdpa_kernel([kernel]):
        out = F.scaled_dot_product_attention(q, k, mixed, is_causal=case.causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _flash_attention(name: str, case: AttentionBenchmark, leaves: list[Tensor]) -> Any:
    attend = _imported(name, case.direction)
    return attend(*leaves[:2], peer_mix(*leaves[2:]), causal=case.causal)


def _flex(case: AttentionBenchmark, leaves: list[Tensor]) -> Tensor:
    mask = _block_mask(case.length, case.device) if case.causal else None
    return compiled(_mix_and_flex)(leaves, mask, case.heads != case.kv_heads)


def _peer(attend: Callable[[AttentionBenchmark, list[Tensor]], Any]) -> Callable[[Any], Call]:
    """The maker of a peer whose output has time first."""

    def make(case: AttentionBenchmark) -> Call:
        leaves = case.leaves()
        outputs = functools.partial(attend, case, leaves)
        return timed_call(outputs, leaves, case.direction, case.grad())

    return make


@dataclass(frozen=True)
class DeviceAttention(AttentionBenchmark):
    """An attention case on a GPU.

    A call returns out (B, T, H, D), or the gradients of q, k, v, v_first and both λ. A maker
    raises `Unavailable` where this machine lacks what it needs.
    """

    peers: tuple[str, ...] = DEVICE_PEERS
    device: str = "cuda"

    known_peers: ClassVar[Mapping[str, Callable[[Any], Call]]] = {
        SDPA_FLASH: _peer(functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
        SDPA_CUDNN: _peer(functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
        FA3: _peer(functools.partial(_flash_attention, FA3)),
        FA4: _peer(functools.partial(_flash_attention, FA4)),
        FLEX: _peer(_flex),
    }

    def ours(self) -> Call:
        """This package's call; `Unavailable` where no kernel serves it."""
        require_kernel(value_residual_attention, self.leaves(), self.options())
        return super().ours()


def _mix(v: Tensor, v_first: Tensor, lambda_v: Tensor, lambda_first: Tensor) -> Tensor:
    return (lambda_v * v.float() + lambda_first * v_first.float()).to(v.dtype)


def peer_mix(v: Tensor, v_first: Tensor, lambda_v: Tensor, lambda_first: Tensor) -> Tensor:
    """The peers' V': one compiled pass on a GPU, an expression of PyTorch's elsewhere."""
    mix = compiled(_mix) if v.is_cuda else _mix
    # One shape, and so one compilation, for all cases of a size.
    return mix(v.flatten(), v_first.flatten(), lambda_v, lambda_first).view_as(v)


def _mix_and_flex(leaves: list[Tensor], mask: Any, grouped: bool) -> Tensor:
    q, k, mixed = (x.transpose(1, 2) for x in (*leaves[:2], _mix(*leaves[2:])))
    out: Any = flex_attention(q, k, mixed, block_mask=mask, enable_gqa=grouped)
    result: Tensor = out.transpose(1, 2)
    return result


@functools.lru_cache(maxsize=1)
def _block_mask(length: int, device: str) -> Any:
    def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(causal, None, None, length, length, device=device)


def _imported(peer: str, direction: str) -> Callable[..., Any]:
    missing = []
    for name in _MODULES[peer]:
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
