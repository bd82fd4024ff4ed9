"""The backward op on Triton: the order of its launches. See README.md for the equations.

`rows` reduces dO and O to one number a row; `keys` gives dK, dV' and what follows from it;
`queries` gives dQ; `bias` the gradient of an additive attn_bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels.attention.op import BackwardCall, absent_gradient
from resformer_kernels.attention.record import LEAVES
from resformer_kernels.attention.triton.bias import bias_gradient
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
    found: dict[str, Tensor | None] = {}
    incoming, found["sinks"] = reduce_rows(given, want_sinks=wanted["sinks"])
    of_keys = [wanted[name] for name in _OF_KEYS]
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
