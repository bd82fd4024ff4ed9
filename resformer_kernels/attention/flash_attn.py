"""The backend of FlashAttention's own packages: `mix_values`, then their kernel.

Any of FlashAttention 3 (`flash_attn_interface`), its forward-only build (`fa3_fwd_interface`) and
FlashAttention 2 (`flash_attn`) will do. What their kernels get wrong or cannot say is refused; what
they leave undone (rows after the packed sequences, the LSE of rows without keys) is done here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.gradient import once, refuse_forward_mode, wants_gradient
from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels._core.op import vmap_error
from resformer_kernels.attention.record import FIXED, AttentionCall
from resformer_kernels.mix import mix_values

NAME = "flash_attn"

_MAX_HEAD_DIM = 256
_MULTIPLE = 8
"""Elements in 16 bytes: what their loads ask of strides and offsets."""
_HEAD_DIMS = (64, 96, 128, 192, _MAX_HEAD_DIM)
"""What FlashAttention 3 has kernels for; others are served by the next."""


class _Source(NamedTuple):
    """A package that may be installed."""

    module: str
    config: str | None
    """The module that says what the build left out."""
    hopper: bool
    """Whether it is FlashAttention 3, for compute capability 9.0."""


class Package(NamedTuple):
    """One that is."""

    attend: Callable[..., Any]
    attend_packed: Callable[..., Any]
    lacks: tuple[str, ...]
    """What the build left out: "BACKWARD", "LOCAL", "HDIM96" and their like."""


_SOURCES = (
    _Source("flash_attn_interface", "flash_attn_config", hopper=True),
    _Source("fa3_fwd_interface", "fa3_fwd_config", hopper=True),
    _Source("flash_attn", None, hopper=False),
)


def unsupported_reason(call: AttentionCall, hardware: Hardware) -> str | None:
    """Why no package of FlashAttention's can serve this call; None when one can."""
    reason = _device_reason(call.q.device, hardware) or _call_reason(call)
    if reason is not None:
        return reason
    reasons = []
    for source in _SOURCES:
        reason = _source_reason(source, call, hardware)
        if reason is None:
            return None
        reasons.append(f"{source.module}: {reason}")
    return "; ".join(reasons)


def notes(call: AttentionCall) -> list[str]:
    """What runs, and what is copied before it."""
    found = [f"{_choose(call).module} serves it"]
    mixes = call.v is not None and call.v_first is not None
    if mixes:
        found.append("V' is made by mix_values first, and read by the kernel")
    if call.cu_seqlens_q is not None:
        found.append("q, k and the values are copied once, with zeros after the last sequence")
        return found
    named = (("q", call.q), ("k", call.k), ("v", call.v), ("v_first", call.v_first))
    found += [
        f"{name} is copied once: its rows are not contiguous, or not aligned to 16 bytes"
        for name, tensor in named[: 2 if mixes else 4]
        if tensor is not None and not _aligned(tensor)
    ]
    return found


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, mixed value or None), as `AttentionCall` asks."""
    if not torch.compiler.is_compiling():
        leaves = (call.q, call.k, call.v, call.v_first, call.lambda_v, call.lambda_first)
        refuse_forward_mode(FIXED, leaves)
    source = _choose(call)
    package = MACHINE.packages[source.module]
    after_q = _after(call.cu_seqlens_q, call.q)
    after_k = _after(call.cu_seqlens_k, call.k)
    q, k, value = _Guard.apply(call.q, after_q), _Guard.apply(call.k, after_k), _mix(call, after_k)
    left, right = _window(call)
    options = {
        "softmax_scale": call.scale,
        "causal": right == 0,
        "window_size": (left, -1 if right == 0 else right),
        "softcap": call.softcap,
        "deterministic": True,
        "return_attn_probs": True,
    }
    tensors = (_ready(q), _ready(k), _ready(value))
    if call.cu_seqlens_q is None:
        out, lse, *_ = package.attend(*tensors, **options)
    else:
        assert call.cu_seqlens_k is not None
        out, lse, *_ = package.attend_packed(
            *tensors,
            call.cu_seqlens_q.contiguous(),
            call.cu_seqlens_k.contiguous(),
            call.max_seqlen_q,
            call.max_seqlen_k,
            **options,
        )
        assert after_q is not None
        out = out.masked_fill(after_q[:, None, None], 0)
        lse = lse.masked_fill(after_q, -torch.inf)
    return (
        out,
        _natural(lse, out) if call.return_lse else None,
        value if call.return_mixed_value else None,
    )


def _device_reason(device: torch.device, hardware: Hardware) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA tensors, these are on {device}"
    if torch.version.hip is not None:
        return "it was never run on ROCm, which these tensors are on"
    major, minor = hardware.capability(device)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, {device} has {major}.{minor}"
    return None


def _call_reason(call: AttentionCall) -> str | None:
    """What none of the packages serves."""
    value = call.v if call.v is not None else call.v_first
    assert value is not None
    head_dim = call.q.shape[-1]
    leaves = (call.q, call.k, call.v, call.v_first, call.lambda_v, call.lambda_first)
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"it serves bfloat16 and float16, these are {call.q.dtype}"
    if call.attn_bias is not None:
        return "it does not take attn_bias"
    if call.sinks is not None:
        return "it does not take sinks"
    if head_dim != value.shape[-1]:
        return f"its values have q's head_dim, these have {value.shape[-1]} and q has {head_dim}"
    if head_dim > _MAX_HEAD_DIM:
        return f"it serves a head_dim of at most {_MAX_HEAD_DIM}, this is {head_dim}"
    if call.scale <= 0:
        return f"it takes the maximum before scaling, and so no scale of 0 or less ({call.scale})"
    if call.return_lse and wants_gradient(leaves):
        return "its LSE has no gradient: call it under torch.no_grad(), or without return_lse"
    # An empty grid is an error of the driver there.
    sequences = call.q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
    if 0 in (*call.q.shape, *call.k.shape, sequences, call.max_seqlen_q, call.max_seqlen_k):
        return "it does not take empty tensors"
    return None


def _source_reason(source: _Source, call: AttentionCall, hardware: Hardware) -> str | None:
    """What this package does not serve."""
    lacks = hardware.package(source.module, load)
    if isinstance(lacks, str):
        return lacks
    if source.hopper and hardware.capability(call.q.device)[0] != 9:
        return "it is written for compute capability 9.0"
    leaves = (call.q, call.k, call.v, call.v_first, call.lambda_v, call.lambda_first)
    head_dim = call.q.shape[-1]
    left, right = _window(call)
    trains = wants_gradient(leaves)
    local = left >= 0 or right > 0
    if source.hopper and head_dim % _MULTIPLE:
        return f"it serves a head_dim that is a multiple of {_MULTIPLE}, this is {head_dim}"
    # It takes an unbounded side for one of max_seqlen_k, counted from the query's place: with more
    # queries than keys, that place may lie further before the first key.
    late = call.max_seqlen_q > call.max_seqlen_k + 1
    if not source.hopper and local and not 0 <= right < call.max_seqlen_k and late:
        return "its windows that are open to the right need no more queries than keys"
    wanted = {
        "BACKWARD": trains,
        "LOCAL": local,
        "SOFTCAP": call.softcap > 0,
        "FP16": call.q.dtype is torch.float16,
        "VARLEN": call.cu_seqlens_q is not None,
    }
    missing = [name for name, needed in wanted.items() if needed and name in lacks]
    if missing:
        return f"it was built without {', '.join(missing)}"
    built = [size for size in _HEAD_DIMS if head_dim <= size and f"HDIM{size}" not in lacks]
    if not built:
        return f"it was built without a head_dim of {head_dim}"
    if source.hopper and trains and built[0] == _MAX_HEAD_DIM:
        return f"its deterministic backward has no head_dim of {built[0]}, which serves {head_dim}"
    return None


def load(name: str) -> Package | str:
    """The package of that name in `_SOURCES`, or why it cannot be used."""
    (source,) = (source for source in _SOURCES if source.module == name)
    try:
        module = importlib.import_module(name)
        config = importlib.import_module(source.config) if source.config else None
    except ModuleNotFoundError as error:
        if error.name == name:
            return "it is not installed"
        return f"it does not import: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"it does not import: {error}"
    functions = (module.flash_attn_func, module.flash_attn_varlen_func)
    needed = ("softmax_scale", "causal", "window_size", "softcap", "deterministic")
    for function in functions:
        known = inspect.signature(function).parameters
        absent = [name for name in (*needed, "return_attn_probs") if name not in known]
        if absent:
            return (
                f"its {function.__name__} takes no {', '.join(absent)}: another version is needed"
            )
    flags = config.CONFIG["build_flags"] if config is not None else {}
    lacks = (name.split("_")[-1] for name, on in flags.items() if on and "_DISABLE_" in name)
    return Package(*functions, tuple(lacks))


def _choose(call: AttentionCall) -> _Source:
    return next(source for source in _SOURCES if _source_reason(source, call, MACHINE) is None)


def _window(call: AttentionCall) -> tuple[int, int]:
    """The window, with -1 for a side that reaches every key."""
    left = -1 if call.window_left >= call.max_seqlen_k - 1 else call.window_left
    right = -1 if call.window_right >= call.max_seqlen_q - 1 else call.window_right
    return left, right


def _after(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """(total,): whether a packed row lies after the last sequence; None where nothing is packed."""
    if cu_seqlens is None:
        return None
    return torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1]


def _mix(call: AttentionCall, after: Tensor | None) -> Tensor:
    """V', zero after the last sequence, no alias of an input."""
    v, v_first = (x if x is None else _Guard.apply(x, after) for x in (call.v, call.v_first))
    if v is None or v_first is None:
        value = v if v is not None else v_first
        assert value is not None
        return value.clone() if after is None and call.return_mixed_value else value
    own = call.lambda_v_value if call.lambda_v is None else call.lambda_v
    first = call.lambda_first_value if call.lambda_first is None else call.lambda_first
    return _Guard.apply(mix_values([v, v_first], [own, first]), after)


def _aligned(x: Tensor) -> bool:
    """Whether each row is contiguous and starts at a multiple of 16 bytes."""
    strides = [
        stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1
    ]
    # torch.compile cannot trace the question; it copies misaligned inputs itself.
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    rows_fit = x.stride(-1) == 1 and all(s > 0 and s % _MULTIPLE == 0 for s in strides)
    return rows_fit and offset % _MULTIPLE == 0


def _ready(x: Tensor) -> Tensor:
    return x if _aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _natural(lse: Tensor, out: Tensor) -> Tensor:
    """The LSE as the contract has it: theirs is infinite for rows without keys, and for NaN."""
    unknown = out.isnan().any(-1).transpose(-1, -2)
    instead = torch.where(unknown, torch.nan, -torch.inf)
    return torch.where(lse.isinf(), instead, lse)


def _closed(x: Tensor, after: Tensor | None) -> tuple[Tensor]:
    return (x.view_as(x) if after is None else x.masked_fill(after[:, None, None], 0),)


class _Guard(torch.autograd.Function):
    """apply(x, after) -> x, with zeros where `after`; so is its gradient, which has none itself."""

    @staticmethod
    def forward(x: Tensor, after: Tensor | None) -> Tensor:
        return _closed(x, after)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (after,) = ctx.saved_tensors
        return (*once(FIXED, _closed, (grad, after)), None)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(FIXED))
