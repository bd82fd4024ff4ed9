"""The arguments of the Triton kernels, from the op's: what forward and backward launches share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resformer_kernels._triton import device as lib
from resformer_kernels._triton.views import (
    Coefficient,
    View,
    coefficient_of,
    form_over_tile,
    view_of,
)
from resformer_kernels.attention.triton import tiles

FAR = 2**30
"""Stands for any larger side of a window, within 32 bits."""
_LOG2E = 1.4426950408889634


class Values(NamedTuple):
    """What V' is mixed from; v alone where nothing is mixed."""

    v: View
    v_first: View
    own: Coefficient
    first: Coefficient


class Bias(NamedTuple):
    """attn_bias by strides, 0 where it broadcasts."""

    pointer: Tensor | None
    batch: int
    head: int
    query: int
    key: int


def lse_view(lse: Tensor) -> View:
    """(B, Hq, Tq), or (Hq, total), by strides; time is contiguous."""
    return View(lse, lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-1), lse.stride(-2))


def bias_of(tensor: Tensor | None) -> tuple[Bias, int, Any]:
    """attn_bias, its kind, and the integer type that holds its offsets."""
    if tensor is None:
        return Bias(None, 0, 0, 0, 0), tiles.NO_BIAS.value, tl.int32
    boolean = tensor.dtype is torch.bool
    strides = [
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    kind = tiles.BOOLEAN if boolean else tiles.ADDITIVE
    data = tensor.view(torch.uint8) if boolean else tensor
    return Bias(data, *strides), kind.value, tl.int32 if span < 2**31 else tl.int64


def score_scale(scale: float, softcap: float, *, biased: bool, precise: bool) -> tuple[float, bool]:
    """(alpha, RAW) of `triton_tiles.scores`; `biased`: an additive bias follows the softcap."""
    capped = softcap > 0
    alpha = scale / softcap if capped else scale
    if capped or biased or precise:
        return alpha, False
    alpha *= _LOG2E
    # The maximum of scores is alpha times that of the products only where alpha > 0, and -inf
    # times an alpha that is 0 in float32 would be NaN.
    return alpha, alpha > 1e-30


def padded(dim: int) -> int:
    """The width of a tile that holds `dim` columns: a power of two that a product takes."""
    return max(16, 1 << (dim - 1).bit_length())


def descriptor_of(
    tensor: Tensor | None, length: int, block: int, group: int | None = None
) -> TensorDescriptor | None:
    """A TMA descriptor of tiles (1, length, 1, block) of a (batch, time, heads, dim) tensor.

    With `group`, of (1, length, 1, group, block): its heads then are (KV heads, group). None where
    the layout does not allow one: an empty tensor, addresses off 16 bytes, an axis that is one
    element seen many times, a group that is no power of two.
    """
    if tensor is None or tensor.numel() == 0 or (group is not None and group & (group - 1)):
        return None
    whole = tensor if tensor.dim() == 4 else tensor[None]
    tile = [1, length, 1, block]
    if group is not None:
        whole = whole.unflatten(2, (whole.shape[2] // group, group))
        tile.insert(3, group)
    unit = 16 // tensor.element_size()
    strides = [
        unit * -(-block // unit) if size == 1 else stride
        for size, stride in zip(whole.shape[:-1], whole.stride()[:-1], strict=True)
    ]
    if tensor.data_ptr() % 16 or any(stride % unit or stride == 0 for stride in strides):
        return None
    return TensorDescriptor(whole, list(whole.shape), [*strides, 1], tile)


@dataclass(frozen=True)
class Problem:
    """One call of the op, forward or backward, in the terms of the kernels."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    v_first: Tensor | None
    lambda_v: Tensor | None
    lambda_first: Tensor | None
    lambda_v_value: float
    lambda_first_value: float
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    window_left: int
    window_right: int
    scale: float
    softcap: float
    sinks: Tensor | None
    attn_bias: Tensor | None

    @property
    def packed(self) -> bool:
        return self.cu_q is not None

    @property
    def mixes(self) -> bool:
        return self.v is not None and self.v_first is not None

    @property
    def value(self) -> Tensor:
        """A tensor of values that is there."""
        value = self.v if self.v is not None else self.v_first
        assert value is not None
        return value

    @property
    def precise(self) -> bool:
        """float32: natural scores, and functions to an ulp."""
        return self.q.dtype is torch.float32

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_q is None else self.cu_q.shape[0] - 1

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.k.shape[-2]

    @property
    def group(self) -> int:
        """Query heads to a KV head."""
        return self.q.shape[-2] // self.heads

    @property
    def rows(self) -> int:
        """The most rows of a sequence and KV head."""
        return self.max_q * self.group

    @property
    def mask_kind(self) -> str:
        """By which of its masks, or what else is done to its scores, tiles are chosen."""
        if self.attn_bias is not None or self.softcap > 0:
            return "transformed"
        if self.window_left >= 0:
            return "window"
        return "causal" if self.window_right >= 0 else "full"

    def values(self, mixed: Tensor | None = None) -> tuple[Values, dict[str, Any]]:
        """What V' is loaded from and how; `mixed`: V' itself, where it was mixed before."""
        own = coefficient_of(self.lambda_v, self.lambda_v_value)
        first = coefficient_of(self.lambda_first, self.lambda_first_value)
        mixes = self.mixes and mixed is None
        v, v_first = (self.v, self.v_first) if mixes else (self.value, None)
        values = Values(view_of(mixed if mixed is not None else v), view_of(v_first), own, first)
        # A tile has the tokens of one head, by the channels.
        forms = [
            form_over_tile(c, c.time != 0, c.column != 0) if mixes else lib.NUMBER.value
            for c in (own, first)
        ]
        return values, {"OWN_FORM": forms[0], "FIRST_FORM": forms[1], "MIXES": mixes}

    def masks(self) -> dict[str, Any]:
        """The arguments that say which keys a row may see."""
        return {
            "cu_q": self.cu_q,
            "cu_k": self.cu_k,
            "q_len": self.max_q,
            "k_len": self.max_k,
            "heads": self.heads,
            "window_left": min(self.window_left, FAR),
            "window_right": min(self.window_right, FAR),
            "GROUP": self.group,
            "HAS_LEFT": self.window_left >= 0,
            "HAS_RIGHT": self.window_right >= 0,
            "PACKED": self.packed,
        }

    def scores(self) -> dict[str, Any]:
        """The arguments that turn a product q.k into a score."""
        bias, kind, index = bias_of(self.attn_bias)
        biased = kind == tiles.ADDITIVE.value
        alpha, raw = score_scale(self.scale, self.softcap, biased=biased, precise=self.precise)
        return {
            "bias": bias,
            "alpha": alpha,
            "softcap": self.softcap,
            "CAPPED": self.softcap > 0,
            "BIAS": kind,
            "RAW": raw,
            "PRECISE": self.precise,
            "INDEX": index,
        }

    def dims(self) -> dict[str, int]:
        """Head dimensions, and the widths of the tiles that hold them."""
        dim_k, dim_v = self.q.shape[-1], self.value.shape[-1]
        return {
            "DIM_K": dim_k,
            "DIM_V": dim_v,
            "BLOCK_K": padded(dim_k),
            "BLOCK_V": padded(dim_v),
        }
