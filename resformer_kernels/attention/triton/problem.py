"""A call in the terms of the Triton kernels: the records that several launches share.

Fields in capitals are compile-time constants. Of the numbers, `specialise` says which are worth a
compilation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resformer_kernels._triton.arch import has_tensor_descriptors
from resformer_kernels._triton.device import NUMBER, PER_ELEMENT, PER_ROW
from resformer_kernels._triton.launch import capability
from resformer_kernels._triton.specialise import Stride, Unit
from resformer_kernels._triton.views import View, coefficient_of, form_over_tile, view_of
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.triton import configs
from resformer_kernels.attention.triton.softmax import ADDITIVE, BOOLEAN, NO_BIAS

FAR = 2**30
"""Stands for any larger side of a window, within 32 bits."""
_LOG2E = 1.4426950408889634
# Bytes of keys and values that a section of heads may keep in the second-level cache.
_CACHE_BYTES = 16 * 2**20


class Bias(NamedTuple):
    """attn_bias by strides, 0 where it broadcasts."""

    pointer: Tensor | None
    batch: Stride
    head: Stride
    query: Stride
    key: Unit


class Scoring(NamedTuple):
    """How a product q.k becomes a score: see `softmax.scores`."""

    bias: Bias
    alpha: float
    softcap: float
    CAPPED: tl.constexpr
    BIAS: tl.constexpr
    RAW: tl.constexpr
    PRECISE: tl.constexpr
    """float32: functions to an ulp."""
    NATURAL: tl.constexpr
    """Whether scores are natural, not in log2: where PRECISE, and under an additive bias, for
    log2(e) times the most negative finite number is -inf."""
    INDEX: tl.constexpr
    """Integer type of offsets into the bias."""
    HAS_LEFT: tl.constexpr
    """Whether the window is bounded on the left, so that keys before it are masked."""


class Geometry(NamedTuple):
    """How sequences and heads lie in the tensors, and which sides of the window are bounded."""

    cu_q: Tensor | None
    cu_k: Tensor | None
    heads: int
    """KV heads."""
    GROUP: tl.constexpr
    """Query heads per KV head."""
    PACKED: tl.constexpr
    HAS_LEFT: tl.constexpr
    HAS_RIGHT: tl.constexpr


class Sizes(NamedTuple):
    """Head dimensions, the tile widths that hold them, and rows and keys of a tile."""

    DIM_K: tl.constexpr
    DIM_V: tl.constexpr
    BLOCK_K: tl.constexpr
    BLOCK_V: tl.constexpr
    ROWS: tl.constexpr
    KEYS: tl.constexpr


class Work(NamedTuple):
    """How programs share the tiles: see `tiles.scheduled`."""

    sequences: int
    tiles: int
    """Tiles of a sequence and KV head."""
    section: int
    open_tiles: Tensor | None
    """Tiles that a boolean mask leaves open: see `tiles.open_tiles_kernel`."""
    list_size: int


class Factor(NamedTuple):
    """A mixing coefficient: a tensor by strides, 0 where it broadcasts, or a number."""

    pointer: Tensor | None
    number: float
    batch: Stride
    time: Stride
    head: Stride
    column: Unit
    FORM: tl.constexpr


class Values(NamedTuple):
    """The sources of V'; v alone where nothing is mixed."""

    v: View
    v_first: View
    own: Factor
    first: Factor
    MIXES: tl.constexpr


class Numbers(NamedTuple):
    """A number for each query and head, by strides."""

    pointer: Tensor | None
    batch: int
    time: Unit
    head: int


class Epilogue(NamedTuple):
    """What follows the softmax: see `attention.epilogue`. Its factors lie over queries and query
    heads; a gate whose FORM is NUMBER is none."""

    exclusive: Factor
    gate: Factor
    least: float
    """exclusive_eps^2."""
    along: Numbers
    ungated: View
    EXCLUDES: tl.constexpr


def mask_kind(call: AttentionCall) -> str:
    """The mask, or transformation of scores, by which tiles are chosen."""
    if call.attn_bias is not None or call.softcap > 0:
        return "transformed"
    if call.window_left >= 0:
        return "window"
    return "causal" if call.window_right >= 0 else "full"


def config_of(call: AttentionCall, direction: str, mask: str | None = None) -> configs.Config:
    """The configuration of a kernel of this call; `mask` in place of the call's own."""
    widest = max(padded(call.q.shape[-1]), padded(call.value.shape[-1]))
    arch = capability(call.q.device)
    return configs.choose(arch, direction, call.q.dtype, widest, mask or mask_kind(call))


def sizes(call: AttentionCall, rows: int, keys: int) -> Sizes:
    """Sizes of tiles of so many rows and keys."""
    dim_k, dim_v = call.q.shape[-1], call.value.shape[-1]
    found = (dim_k, dim_v, padded(dim_k), padded(dim_v), rows, keys)
    return Sizes(*(tl.constexpr(size) for size in found))


def shared(call: AttentionCall, rows: int, keys: int) -> dict[str, Any]:
    """The arguments that every kernel over scores takes; its tiles have so many rows and keys."""
    flags = (call.group, call.packed, call.window_left >= 0, call.window_right >= 0)
    return {
        "scoring": scoring(call, call.attn_bias),
        "geometry": Geometry(
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.kv_heads,
            *(tl.constexpr(flag) for flag in flags),
        ),
        "q_len": call.max_seqlen_q,
        "k_len": call.max_seqlen_k,
        "window_left": min(call.window_left, FAR),
        "window_right": min(call.window_right, FAR),
        "sizes": sizes(call, rows, keys),
    }


def scoring(call: Any, attn_bias: Tensor | None = None) -> Scoring:
    """How the scores of a call of attention, or over a cache, are made."""
    bias, kind, index = _bias(attn_bias, 0 if attn_bias is None else call.max_seqlen_k)
    precise = call.q.dtype is torch.float32
    capped = call.softcap > 0
    alpha = call.scale / call.softcap if capped else call.scale
    raw = False
    natural = precise or kind is ADDITIVE
    if not (capped or natural):
        alpha *= _LOG2E
        # The maximum of scores is alpha times that of the products only where alpha > 0, and -inf
        # times an alpha that is 0 in float32 would be NaN.
        raw = alpha > 1e-30
    flags = (capped, kind.value, raw, precise, natural, index, call.window_left >= 0)
    return Scoring(bias, alpha, call.softcap, *(tl.constexpr(flag) for flag in flags))


def _bias(tensor: Tensor | None, keys: int) -> tuple[Bias, tl.constexpr, Any]:
    """attn_bias, its kind, and the integer type that holds its offsets."""
    if tensor is None:
        return Bias(None, 0, 0, 0, 1), NO_BIAS, tl.int32
    strides = [
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    if keys == 1:
        # A single key broadcasts or not: as of most calls.
        strides[3] = 1
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    index = tl.int32 if span < 2**31 else tl.int64
    if tensor.dtype is torch.bool:
        return Bias(tensor.view(torch.uint8), *strides), BOOLEAN, index
    return Bias(tensor, *strides), ADDITIVE, index


def values(call: AttentionCall, mixed: Tensor | None = None) -> Values:
    """The sources of V'; `mixed` is V' itself, where it was mixed before."""
    mixes = call.mixes and mixed is None
    v, v_first = (call.v, call.v_first) if mixes else (call.value, None)
    return Values(
        view_of(mixed if mixed is not None else v),
        view_of(v_first),
        _factor(call.lambda_v, call.lambda_v_value, mixes),
        _factor(call.lambda_first, call.lambda_first_value, mixes),
        tl.constexpr(mixes),
    )


def _factor(tensor: Tensor | None, number: float, mixes: bool) -> Factor:
    # Where there are no keys a kernel may still ask for one at a query's own position.
    c = coefficient_of(None if tensor is not None and tensor.numel() == 0 else tensor, number)
    # A tile has the tokens of one head, by the channels.
    form = form_over_tile(c, c.time != 0, c.column != 0) if mixes else NUMBER.value
    return Factor(*c, tl.constexpr(form))


def epilogue_of(call: Any, along: Tensor | None = None, ungated: Tensor | None = None) -> Epilogue:
    """The epilogue of a call, and where its `along` and `ungated` lie."""
    return Epilogue(
        _row_factor(call.exclusive, call.exclusive_value),
        _row_factor(call.out_gate, 1.0),
        call.exclusive_eps**2,
        lse_view(along),
        view_of(ungated),
        tl.constexpr(call.excludes),
    )


def _row_factor(tensor: Tensor | None, number: float) -> Factor:
    """A factor of rows: whatever it broadcasts over, one form by strides, or one with channels."""
    form = NUMBER if tensor is None else PER_ROW if tensor.shape[-1] == 1 else PER_ELEMENT
    return Factor(*coefficient_of(tensor, number), tl.constexpr(form.value))


def lse_view(lse: Tensor | None) -> Numbers:
    """(B, Hq, Tq), or (Hq, total)."""
    if lse is None:
        return Numbers(None, 0, 1, 0)
    return Numbers(lse, lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-1), lse.stride(-2))


def padded(dim: int) -> int:
    """The width of a tile that holds `dim` columns: a power of two that a product takes."""
    return max(16, 1 << (dim - 1).bit_length())


def section(call: AttentionCall, length: int) -> int:
    """Number of KV heads whose tiles are scheduled together: under a causal mask, as many as the
    cache holds, of all that there are: their tiles are then no more than the grid's programs.

    `length` is that of what all programs of a head read: keys and values, or the rows of q and dO.
    """
    if call.window_right < 0 or call.window_left >= 0:
        return 1
    width = call.k.shape[-1] + call.value.shape[-1]
    held = _CACHE_BYTES // max(1, length * width * call.k.element_size())
    return max(1, min(held, call.sequences * call.kv_heads))


def descriptor_of(
    tensor: Tensor | None, length: int, block: int, group: int | None = None
) -> TensorDescriptor | None:
    """A tensor descriptor of tiles (1, length, 1, block) of a (batch, time, heads, dim) tensor.

    With `group`, of tiles (1, length, 1, group, block): heads are then (KV heads, group). None
    where the GPU or the layout allows none: an empty tensor, addresses that are not multiples of 16
    bytes, an expanded axis, a group that is no power of two.
    """
    if tensor is None or tensor.numel() == 0 or (group is not None and group & (group - 1)):
        return None
    if not has_tensor_descriptors(capability(tensor.device)):
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
