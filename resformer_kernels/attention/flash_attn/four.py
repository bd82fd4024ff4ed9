"""FlashAttention 4 (`flash-attn-4`, in CuTe DSL): launchers of attention's ops, in a namespace of
their own.

Its public functions compile kernels within an autograd.Function, which torch.compile cannot trace.
So its two entry points, which torch.nn.attention's own FA4 calls too, stand behind the ops: opaque
to torch.compile, with our gradient, which saves the inputs alone and mixes V' again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.gradient import wants_gradient
from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels.attention import op
from resformer_kernels.attention.flash_attn.rows import (
    MULTIPLE,
    after_last,
    closed,
    functions_of,
    natural,
    ready,
    window,
)
from resformer_kernels.attention.record import LEAVES, AttentionCall
from resformer_kernels.attention.shared import mixed

NAMESPACE = "resformer_flash_attn_4"

_WIDEST = 256
_WINDOWS = ("window_size_left", "window_size_right")
_PACKING = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_SHARED = ("softmax_scale", "causal", "softcap", *_WINDOWS, *_PACKING, "learnable_sink")
_NEEDED = {
    "_flash_attn_fwd": (*_SHARED, "return_lse"),
    "_flash_attn_bwd": (*_SHARED, "deterministic", "dq", "dk", "dv", "dlse"),
}
"""Its entry points, and the parameters that are given by name."""


class _Loaded(NamedTuple):
    """What is used of an installed package."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    lacks: tuple[str, ...] = ()


class Four(NamedTuple):
    """The package, which may be installed."""

    module: str = "flash_attn.cute.interface"
    generation: int = 4

    def reason(self, call: AttentionCall, hardware: Hardware) -> str | None:
        """Why it does not serve the call. `tests/fa4` compiles the forms that it does."""
        major, _ = hardware.capability(call.q.device)
        if major not in (9, 10):
            return "it is used on compute capability 9 and 10 alone"
        head_dim, value_dim = call.q.shape[-1], call.value.shape[-1]
        if not _has_kernels(major, head_dim, value_dim):
            return f"it has no kernels for head dimensions {head_dim} and {value_dim} here"
        if wants_gradient(call.leaves):
            if major == 9 and call.group > 1 and head_dim != value_dim:
                return (
                    "its backward of grouped heads needs values of q's head_dim, these have "
                    f"{value_dim} and q has {head_dim}"
                )
            left, right = window(call)
            local = left >= 0 or right > 0
            unusual = local or call.sinks is not None or call.softcap > 0 or call.return_lse
            if major == 10 and head_dim == _WIDEST and unusual:
                return (
                    f"its backward of head_dim {_WIDEST} here has no window, sinks, softcap or LSE"
                )
        missing = hardware.package(self.module, load)
        return missing if isinstance(missing, str) else None

    def run(self, call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, lse or None, mixed value or None), as `AttentionCall` asks."""
        out, lse, value = op.run(NAMESPACE, call)
        return out, lse if lse is None else natural(lse, out), value


FOUR = Four()


def _has_kernels(major: int, head_dim: int, value_dim: int) -> bool:
    """Whether it has kernels of these sizes. Where the two differ: those that `tests/fa4` compiles;
    values of 8 beside keys of 128 have none, nor have values of 256 beside keys of 64."""
    if head_dim % MULTIPLE or head_dim > _WIDEST or value_dim not in (head_dim, 64, 128):
        return False
    both = (head_dim, value_dim)
    return major == 9 or max(both) <= 128 or both in ((192, 128), (_WIDEST, _WIDEST))


def load(name: str) -> _Loaded | str:
    """The package, or why it cannot be used."""
    functions = functions_of(name, _NEEDED)
    return functions if isinstance(functions, str) else _Loaded(functions[0], functions[1])


def forward(call: AttentionCall) -> tuple[Tensor, ...]:
    """The results of the op for a call that is `plain`; empty where not asked for. The LSE is
    theirs: -inf where it is NaN too."""
    after_q, after_k = _after(call)
    value = _value(call, after_k)
    rows = [ready(x) for x in (closed(call.q, after_q), closed(call.k, after_k), value)]
    with torch.cuda.device_of(call.q):
        out, lse, *_ = _package().forward(*rows, return_lse=call.return_lse, **_options(call))
    out = closed(out, after_q)
    if not call.return_lse:
        lse = out.new_empty((0,), dtype=torch.float32)
    elif after_q is not None:
        lse = lse.masked_fill(after_q, -torch.inf)
    if not call.return_mixed_value:
        value = value.new_empty((0,))
    elif value is call.value:
        value = value.clone(memory_format=torch.contiguous_format)
    return out, lse, value, out.new_empty((0,), dtype=torch.float32), out.new_empty((0,))


def backward(given: op.BackwardCall) -> tuple[Tensor, ...]:
    """The gradient of each leaf of `LEAVES`, empty where it is not wanted."""
    call = given.call
    after_q, after_k = _after(call)
    wanted = [name for bit, name in enumerate(LEAVES) if given.grad_mask >> bit & 1]
    sources = {
        name: getattr(call, name).detach().requires_grad_()
        for name in ("v", "v_first", "lambda_v", "lambda_first")
        if name in wanted
    }
    with torch.set_grad_enabled(call.mixes):
        value = _value(call._replace(**sources), after_k)
    rows = [ready(x) for x in (closed(call.q, after_q), closed(call.k, after_k), value.detach())]
    d_lse = given.grad_lse
    if d_lse is not None:
        d_lse = d_lse.contiguous() if after_q is None else d_lse.masked_fill(after_q, 0)
    with torch.cuda.device_of(call.q):
        dq, dk, d_value, *d_sinks = _package().backward(
            *rows,
            given.out,
            ready(closed(given.grad_out, after_q)),
            given.lse,
            dlse=d_lse,
            deterministic=True,
            **{
                name: x.new_empty(x.shape) for name, x in zip(("dq", "dk", "dv"), rows, strict=True)
            },
            **_options(call),
        )
    found = {"q": closed(dq, after_q), "k": closed(dk, after_k)}
    if d_sinks:
        found["sinks"] = d_sinks[0]
    if given.grad_mixed is not None:
        d_value = d_value + given.grad_mixed
    if sources and call.mixes:
        found |= zip(sources, torch.autograd.grad(value, [*sources.values()], d_value), strict=True)
    elif sources:
        found |= dict.fromkeys(sources, closed(d_value, after_k))
    return tuple(
        found[name] if name in wanted else op.absent_gradient(call, bit)
        for bit, name in enumerate(LEAVES)
    )


def _package() -> _Loaded:
    loaded: _Loaded = MACHINE.packages[FOUR.module]
    return loaded


def _after(call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    return after_last(call.cu_seqlens_q, call.q), after_last(call.cu_seqlens_k, call.k)


def _value(call: AttentionCall, after: Tensor | None) -> Tensor:
    """V', zero after the last sequence; the gradient of each source is zero there too."""
    v, v_first = (x if x is None else closed(x, after) for x in (call.v, call.v_first))
    value = mixed(call._replace(v=v, v_first=v_first))
    return closed(value, after) if call.mixes else value


def _options(call: AttentionCall) -> dict[str, Any]:
    """The arguments by name that both entry points take."""
    left, right = (None if side < 0 else side for side in window(call))
    options = {
        "softmax_scale": call.scale,
        "causal": right == 0,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": call.softcap,
        "learnable_sink": call.sinks,
    }
    packing = {name: getattr(call, name) for name in _PACKING} if call.packed else {}
    return options | packing


_libraries = [
    op.FORWARD.define(NAMESPACE, f"{__name__}:forward"),
    op.BACKWARD.define(NAMESPACE, f"{__name__}:backward"),
]
