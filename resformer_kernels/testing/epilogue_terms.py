"""S of `budgets` where something is excluded or gated: the terms that cancel, from float64 inputs.

The epilogue y -> out (see `attention.epilogue`) is a sum, as are its gradients; a call with it is
the plain call whose output gradients are d_y and d_mixed + d_w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.select import prepare
from resformer_kernels.attention import reference
from resformer_kernels.attention.record import AttentionCall

_NAMES = ("exclusive", "exclusive_eps", "out_gate")


def output_terms(run: Callable[[Any], Tensor], inputs: Any) -> dict[str, float]:
    """{"out": S}, or nothing where the call is plain. `run` gives the output of float64 inputs."""
    tensors, options = inputs.tensors, inputs.options
    if not any(name in tensors or name in options for name in ("exclusive", "out_gate")):
        return {}
    y = run(without(inputs, _NAMES))
    taken = y - run(without(inputs, ("out_gate",)))
    gate = tensors.get("out_gate")
    if gate is not None:
        y, taken = gate * y, gate * taken
    return {"out": float(y.nan_to_num().norm() + taken.nan_to_num().norm())}


def without(inputs: Any, names: tuple[str, ...]) -> Any:
    """Inputs without the arguments of these names."""
    return replace(
        inputs,
        tensors={name: x for name, x in inputs.tensors.items() if name not in names},
        options={name: x for name, x in inputs.options.items() if name not in names},
    )


class Plain(NamedTuple):
    """A call of attention without its epilogue."""

    inputs: Any
    """Those of the plain call, which returns the LSE and V', with the gradients of its outputs."""
    magnitudes: tuple[Tensor, ...]
    """Those gradients as the sums of their terms' magnitudes."""
    terms: dict[str, float]
    """S of out and of the epilogue's own gradients."""


def plain_call(inputs: Any, grads: dict[str, Tensor]) -> Plain:
    """The plain call of float64 inputs of attention; `grads` are the outputs' by name."""
    call: AttentionCall = prepare(inputs.function, **inputs.tensors, **inputs.options).call
    bare = without(inputs, _NAMES)
    bare = replace(bare, options={**bare.options, "return_lse": True, "return_mixed_value": True})
    with torch.no_grad():
        y, lse, value = bare.function(**bare.tensors, **bare.options, backend="reference")
    found = _Pieces(call, y, value, grads["out"])
    mixed = grads.get("mixed", torch.zeros_like(value))
    grad_lse = grads.get("lse", torch.zeros_like(lse))
    signed = (found.dy[0] + found.dy[1], grad_lse, mixed + found.onto_values(sum, found.dw))
    every = [x.abs() for x in found.dw]
    sizes = (
        found.dy[0].abs() + found.dy[1].abs(),
        grad_lse,
        mixed.abs() + found.onto_values(sum, every),
    )
    return Plain(replace(bare, grads=signed), sizes, found.terms)


class _Pieces:
    """The terms of the epilogue and of its gradient, over (B, Tq, Hq, Dv)."""

    def __init__(self, call: AttentionCall, y: Tensor, value: Tensor, grad: Tensor) -> None:
        self.call, self.value = call, value
        y, value, self.at = reference.placed(call, y, value)
        call = reference.closed(call)
        grad = grad.nan_to_num() if call.packed else grad
        grad = grad[None] if call.packed else grad
        w = reference.own_values(value, self.at, y)
        gate = torch.ones_like(y) if call.out_gate is None else call.out_gate.expand_as(y)
        e = torch.tensor(call.exclusive_value, dtype=y.dtype)
        if call.exclusive is not None:
            e = call.exclusive
        size = w.square().sum(-1, keepdim=True)
        above = size > call.exclusive_eps**2
        size = size.clamp(min=call.exclusive_eps**2)
        a = (y * w).sum(-1, keepdim=True) / size
        du = gate * grad
        c = (du * w).sum(-1, keepdim=True)
        taken = e * a * w
        self.dy = [self._flat(x) for x in (du, -e * c / size * w)]
        self.dw = [-e * a * du, -e * c / size * y, 2 * e * c * a / size * w * above]
        of_gate = torch.cat([grad * y, grad * taken], -1)
        of_exclusive = torch.cat([a * du * w, c / size * y * w], -1)
        out = torch.cat([gate * y, gate * taken], -1)
        terms = (("out", out), ("dout_gate", of_gate), ("dexclusive", of_exclusive))
        self.terms = {name: float(x.norm()) for name, x in terms}

    def _flat(self, x: Tensor) -> Tensor:
        return x[0] if self.call.packed else x

    def onto_values(self, total: Callable[..., Any], pieces: list[Tensor]) -> Tensor:
        """The sum of pieces of d_w, at the keys that they belong to, in the shape of V'."""
        rows = total(pieces)
        heads = self.value.shape[-2]
        rows = rows.unflatten(2, (heads, rows.shape[2] // heads)).sum(3)
        kept = (self.at >= 0).expand(rows.shape[:2])
        found = torch.zeros_like(self.value)
        whole = found[None] if self.call.packed else found
        batch, query = kept.nonzero(as_tuple=True)
        at = self.at.expand(rows.shape[:2])[batch, query]
        whole.index_put_((batch, at), rows[batch, query], accumulate=True)
        return found
