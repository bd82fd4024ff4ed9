"""The epilogue as an op of its own, with its gradient, for kernels that have none: see `epilogue`.

Saved for backward: y and V', which such a kernel saves too, and the factors.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core import gradient
from resformer_kernels._core.op import Op, SymInt, vmap_error
from resformer_kernels._core.strides import with_unit_strides
from resformer_kernels.attention import reference
from resformer_kernels.attention.record import FIXED, AttentionCall

LEAVES = ("y", "value", "exclusive", "out_gate")
"""Arguments that have gradients, in the order of the backward op's results and of `grad_mask`."""


class EpilogueCall(NamedTuple):
    """y, which has q's heads, and V'; the rest is as in `AttentionCall`. `value` is None where
    nothing is excluded."""

    y: Tensor
    value: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: SymInt
    max_seqlen_k: SymInt
    exclusive: Tensor | None
    exclusive_value: float
    exclusive_eps: float
    out_gate: Tensor | None

    def attention(self) -> AttentionCall:
        """The call of attention that has this epilogue: its queries are y, its keys and values V',
        or y in its place where nothing reads it."""
        value, own = self.value, self.value is not None
        if value is None:
            value = self.y
        return AttentionCall(
            *(self.y, value, value, None, None, None, 1.0, 1.0),
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k if own else self.cu_seqlens_q,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k if own else self.max_seqlen_q,
            window_left=-1,
            window_right=-1,
            scale=1.0,
            softcap=0.0,
            sinks=None,
            attn_bias=None,
            return_lse=False,
            return_mixed_value=False,
            exclusive=self.exclusive,
            exclusive_value=self.exclusive_value,
            exclusive_eps=self.exclusive_eps,
            out_gate=self.out_gate,
        )


class EpilogueBackwardCall(NamedTuple):
    """The arguments of the backward op. Bit i of grad_mask: leaf i of `LEAVES` wants a gradient."""

    grad_out: Tensor
    call: EpilogueCall
    grad_mask: int

    def wanted(self) -> dict[str, bool]:
        """Which leaves want a gradient."""
        return {name: bool(self.grad_mask >> bit & 1) for bit, name in enumerate(LEAVES)}

    def results(self, found: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
        """The op's results of the gradients that were wanted."""
        gradients = [found.get(name) for name in LEAVES]
        return tuple(_absent(self, i) if x is None else x for i, x in enumerate(gradients))


def _absent(given: EpilogueBackwardCall, bit: int) -> Tensor:
    leaf = getattr(given.call, LEAVES[bit])
    return (given.call.y if leaf is None else leaf).new_empty((0,))


def _forward_fake(call: EpilogueCall) -> Tensor:
    return call.y.new_empty(call.y.shape)


def _backward_fake(given: EpilogueBackwardCall) -> tuple[Tensor, ...]:
    wanted = given.wanted()
    leaves = {name: getattr(given.call, name) for name in LEAVES if wanted[name]}
    return given.results({n: x if x is None else x.new_empty(x.shape) for n, x in leaves.items()})


def forward(_namespace: str, given: EpilogueCall) -> Tensor:
    """The op in plain PyTorch."""
    call, y, value, at = _placed(given, given.y)
    return reference.finish(call, y, value, at).reshape(given.y.shape)


def backward(_namespace: str, given: EpilogueBackwardCall) -> tuple[Tensor, ...]:
    """The op in plain PyTorch."""
    call, y, value, at = _placed(given.call, given.call.y)
    grad = _placed(given.call, given.grad_out)[1]
    gate = 1.0 if call.out_gate is None else call.out_gate.to(y.dtype)
    part = call.exclusive_value if call.exclusive is None else call.exclusive.to(y.dtype)
    du = gate * grad
    w = reference.own_values(value, at, y) if call.excludes else torch.zeros_like(y)
    size = w.square().sum(-1, keepdim=True)
    above = size > call.exclusive_eps**2
    size = size.clamp(min=call.exclusive_eps**2)
    along = (y * w).sum(-1, keepdim=True) / size
    back = (du * w).sum(-1, keepdim=True) / size
    dw = -part * (along * du + back * y - 2 * along * back * above * w)
    # The row after the last one stands for a position without a key.
    onto = y.new_zeros(value.shape[0], value.shape[1] + 1, *value.shape[2:])
    onto.index_add_(1, at[0] % onto.shape[1], dw.unflatten(2, (value.shape[2], -1)).sum(3))
    found = {
        "y": du - part * back * w,
        "value": onto[:, :-1],
        "exclusive": -along * back * size,
        "out_gate": grad * (y - part * along * w),
    }
    leaves = {name: getattr(given.call, name) for name, want in given.wanted().items() if want}
    return given.results(
        {
            name: found[name]
            .sum_to_size(x.shape if x.dim() == 4 else (1, *x.shape))
            .to(x.dtype)
            .reshape(x.shape)
            .contiguous()
            for name, x in leaves.items()
            if x is not None
        }
    )


def _placed(given: EpilogueCall, y: Tensor) -> tuple[AttentionCall, Tensor, Tensor, Tensor]:
    """(call, y, value, at) as `reference.finish` takes them, zero after the last sequence."""
    call = given.attention()
    if call.cu_seqlens_q is not None:
        after = torch.arange(y.shape[0], device=y.device) >= call.cu_seqlens_q[-1]
        y = y.masked_fill(after[:, None, None], 0)
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    return reference.closed(call), *reference.placed(call, y, call.value)


FORWARD = Op(
    "attention_epilogue_forward",
    EpilogueCall,
    "Tensor",
    function=FIXED,
    fake=_forward_fake,
    triton="resformer_kernels.attention.triton.epilogue:forward",
    composed=f"{__name__}:forward",
)
BACKWARD = Op(
    "attention_epilogue_backward",
    EpilogueBackwardCall,
    f"({', '.join(f'Tensor d{name}' for name in LEAVES)})",
    function=FIXED,
    fake=_backward_fake,
    triton="resformer_kernels.attention.triton.epilogue:backward",
    composed=f"{__name__}:backward",
)


_PARTS = gradient.Parts(
    EpilogueCall, ("y", "value", "exclusive", "out_gate", "cu_seqlens_q", "cu_seqlens_k")
)


class AttentionEpilogue(torch.autograd.Function):
    """apply(namespace, *parts of a call) -> out."""

    @staticmethod
    @gradient.signed
    def forward(*arguments: Any) -> Tensor:
        # One parameter: torch binds the signature at every call.
        namespace, rest, *tensors = arguments
        out: Tensor = FORWARD(namespace, _PARTS.join(rest, tensors))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.namespace, ctx.rest, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = _PARTS.wanted(ctx, LEAVES)
        call = _PARTS.join(ctx.rest, ctx.saved_tensors)
        given = EpilogueBackwardCall(grad, call, gradient.mask_of(needs))
        gradients = gradient.run_backward(BACKWARD, ctx.namespace, given)
        return _PARTS.in_place(LEAVES, gradients, needs)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(FIXED))


def epilogue_of(call: AttentionCall, y: Tensor, value: Tensor | None) -> EpilogueCall:
    """The epilogue of `call` on y, which has q's dtype, and V'."""
    return EpilogueCall(
        y=y,
        value=value if call.excludes else None,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_k=call.max_seqlen_k,
        exclusive=call.exclusive,
        exclusive_value=call.exclusive_value,
        exclusive_eps=call.exclusive_eps,
        out_gate=call.out_gate,
    )


def run(namespace: str, call: EpilogueCall) -> Tensor:
    """out, by the ops of `namespace`."""
    call = with_unit_strides(call, ("y", "value", "cu_seqlens_q", "cu_seqlens_k"))
    leaves = [getattr(call, name) for name in LEAVES]
    if torch.compiler.is_compiling():
        call = gradient.distinct(call)
    else:
        gradient.refuse_forward_mode(FIXED, leaves)
    out: Tensor
    if gradient.wants_gradient(leaves):
        out = AttentionEpilogue.apply(namespace, *_PARTS.split(call))
    else:
        out = FORWARD(namespace, call)
    return out
