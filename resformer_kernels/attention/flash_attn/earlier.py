"""FlashAttention 3 (`flash_attn_interface`), its forward-only build (`fa3_fwd_interface`) and
FlashAttention 2 (`flash_attn`): their public functions, which bring gradients of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.gradient import once, refuse_forward_mode, wants_gradient
from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels._core.op import vmap_error
from resformer_kernels.attention.flash_attn.rows import (
    MULTIPLE,
    after_last,
    closed,
    functions_of,
    natural,
    ready,
    window,
)
from resformer_kernels.attention.record import FIXED, AttentionCall
from resformer_kernels.attention.shared import mixed

_HEAD_DIMS = (64, 96, 128, 192, 256)
"""What FlashAttention 3 has kernels for; others are served by the next."""
_NEEDED = (
    *("softmax_scale", "causal", "window_size", "softcap", "deterministic"),
    "return_attn_probs",
)


class _Loaded(NamedTuple):
    """What is used of an installed package."""

    attend: Callable[..., Any]
    attend_packed: Callable[..., Any]
    lacks: tuple[str, ...]
    """What the build left out: "BACKWARD", "LOCAL", "HDIM96" and their like."""


class Earlier(NamedTuple):
    """A package of generation 2 or 3 that may be installed."""

    module: str
    config: str | None
    """The module that says what the build left out."""
    generation: int

    def reason(self, call: AttentionCall, hardware: Hardware) -> str | None:
        """Why this package does not serve the call."""
        lacks = hardware.package(self.module, load)
        if isinstance(lacks, str):
            return lacks
        head_dim, value_dim = call.q.shape[-1], call.value.shape[-1]
        trains = wants_gradient(call.leaves)
        if self.generation == 3 and hardware.capability(call.q.device)[0] != 9:
            return "it is written for compute capability 9.0"
        if call.sinks is not None:
            return "it does not take sinks"
        if head_dim != value_dim:
            return f"its values have q's head_dim, these have {value_dim} and q has {head_dim}"
        if head_dim > _HEAD_DIMS[-1]:
            return f"it serves a head_dim of at most {_HEAD_DIMS[-1]}, this is {head_dim}"
        if call.return_lse and trains:
            return "its LSE has no gradient: call it under torch.no_grad(), or without return_lse"
        return self._build_reason(call, lacks, trains)

    def _build_reason(
        self, call: AttentionCall, lacks: tuple[str, ...], trains: bool
    ) -> str | None:
        head_dim = call.q.shape[-1]
        left, right = window(call)
        local = left >= 0 or right > 0
        if self.generation == 3 and head_dim % MULTIPLE:
            return f"it serves a head_dim that is a multiple of {MULTIPLE}, this is {head_dim}"
        # It takes an unbounded side for one of max_seqlen_k, counted from the query's place: with
        # more queries than keys, that place may lie further before the first key.
        late = call.max_seqlen_q > call.max_seqlen_k + 1
        if self.generation == 2 and local and not 0 <= right < call.max_seqlen_k and late:
            return "its windows that are open to the right need no more queries than keys"
        wanted = {
            "BACKWARD": trains,
            "LOCAL": local,
            "SOFTCAP": call.softcap > 0,
            "FP16": call.q.dtype is torch.float16,
            "VARLEN": call.packed,
        }
        missing = [name for name, needed in wanted.items() if needed and name in lacks]
        if missing:
            return f"it was built without {', '.join(missing)}"
        built = [size for size in _HEAD_DIMS if head_dim <= size and f"HDIM{size}" not in lacks]
        if not built:
            return f"it was built without a head_dim of {head_dim}"
        if self.generation == 3 and trains and built[0] == _HEAD_DIMS[-1]:
            return (
                f"its deterministic backward has no head_dim of {built[0]}, which serves {head_dim}"
            )
        return None

    def run(self, call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, lse or None, mixed value or None), as `AttentionCall` asks."""
        if not torch.compiler.is_compiling():
            refuse_forward_mode(FIXED, call.leaves)
        package = MACHINE.packages[self.module]
        after_q = after_last(call.cu_seqlens_q, call.q)
        after_k = after_last(call.cu_seqlens_k, call.k)
        q, k, value = (
            _Guard.apply(call.q, after_q),
            _Guard.apply(call.k, after_k),
            _mix(call, after_k),
        )
        left, right = window(call)
        options = {
            "softmax_scale": call.scale,
            "causal": right == 0,
            "window_size": (left, -1 if right == 0 else right),
            "softcap": call.softcap,
            "deterministic": True,
            "return_attn_probs": True,
        }
        tensors = (ready(q), ready(k), ready(value))
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
            out = closed(out, after_q)
            lse = lse.masked_fill(after_q, -torch.inf)
        return (
            out,
            natural(lse, out) if call.return_lse else None,
            value if call.return_mixed_value else None,
        )


EARLIER = (
    Earlier("flash_attn_interface", "flash_attn_config", 3),
    Earlier("fa3_fwd_interface", "fa3_fwd_config", 3),
    Earlier("flash_attn", None, 2),
)


def load(name: str) -> _Loaded | str:
    """The package of that name in `EARLIER`, or why it cannot be used."""
    (source,) = (source for source in EARLIER if source.module == name)
    functions = functions_of(name, {"flash_attn_func": _NEEDED, "flash_attn_varlen_func": _NEEDED})
    if isinstance(functions, str):
        return functions
    flags = {}
    if source.config is not None:
        flags = importlib.import_module(source.config).CONFIG["build_flags"]
    lacks = (name.split("_")[-1] for name, on in flags.items() if on and "_DISABLE_" in name)
    return _Loaded(functions[0], functions[1], tuple(lacks))


def _mix(call: AttentionCall, after: Tensor | None) -> Tensor:
    """V', zero after the last sequence, no alias of an input."""
    v, v_first = (x if x is None else _Guard.apply(x, after) for x in (call.v, call.v_first))
    value = mixed(call._replace(v=v, v_first=v_first))
    if call.mixes:
        return _Guard.apply(value, after)
    return value.clone() if after is None and call.return_mixed_value else value


def _guarded(x: Tensor, after: Tensor | None) -> tuple[Tensor]:
    return (x.view_as(x) if after is None else closed(x, after),)


class _Guard(torch.autograd.Function):
    """apply(x, after) -> x, with zeros where `after`; so is its gradient, which has none itself."""

    @staticmethod
    def forward(x: Tensor, after: Tensor | None) -> Tensor:
        return _guarded(x, after)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (after,) = ctx.saved_tensors
        return (*once(FIXED, _guarded, (grad, after)), None)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(FIXED))
