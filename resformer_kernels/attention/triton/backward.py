"""The backward op on Triton: the order of its launches. See README.md for the equations.

`epilogue`, where there is one, turns dO into the gradient of what the softmax gave; `rows` reduces
dO and O to one number a row; `keys` gives dK, dV' and what follows from it; `queries` gives dQ;
`bias` the gradient of an additive attn_bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels.attention.op import BackwardCall, absent_gradient
from resformer_kernels.attention.record import LEAVES
from resformer_kernels.attention.triton.bias import bias_gradient
from resformer_kernels.attention.triton.epilogue import epilogue_gradients
from resformer_kernels.attention.triton.forward import premix
from resformer_kernels.attention.triton.keys import keys_gradients
from resformer_kernels.attention.triton.queries import queries_gradient
from resformer_kernels.attention.triton.rows import reduce_rows

_OF_KEYS = ("k", "v", "v_first", "lambda_v", "lambda_first")


def backward(given: BackwardCall) -> tuple[Tensor, ...]:
    """The backward op: the gradient of each leaf in `LEAVES`."""
    call = given.call
    wanted = {
        name: leaf is not None and bool(given.grad_mask >> bit & 1)
        for bit, (name, leaf) in enumerate(zip(LEAVES, call.leaves, strict=True))
    }
    of_keys = [wanted[name] for name in _OF_KEYS]
    found: dict[str, Tensor | None] = {}
    mixed = premix(call) if call.mixes else call.value
    if given.grad_mixed is not None and not given.grad_mixed.numel():
        given = given._replace(grad_mixed=None)
    dots = None
    if not call.plain:
        opened = epilogue_gradients(
            call,
            given.grad_out,
            given.out,
            mixed,
            given.along if call.excludes else None,
            given.grad_mixed,
            {**wanted, "value": any(of_keys[1:])},
            ungated=call.return_ungated,
        )
        dots, found["exclusive"], found["out_gate"] = opened[2:]
        given = given._replace(grad_out=opened.y)
        if call.excludes:
            given = given._replace(grad_mixed=opened.value)
    incoming, found["sinks"] = reduce_rows(given, mixed, dots, want_sinks=wanted["sinks"])
    if any(of_keys):
        found |= zip(_OF_KEYS, keys_gradients(call, incoming, of_keys), strict=True)
    if wanted["q"]:
        found["q"] = queries_gradient(call, incoming)
    bias = call.attn_bias
    if wanted["attn_bias"] and bias is not None and bias.dtype is not torch.bool:
        found["attn_bias"] = bias_gradient(call, incoming, bias)
    gradients = [found.get(name) for name in LEAVES]
    return tuple(
        absent_gradient(call, bit) if gradient is None else gradient
        for bit, gradient in enumerate(gradients)
    )
