"""What follows the softmax: exclusive self-attention and the output gate.

With y the softmax's output, w the row of V' at the query's own position, n = max(|w|, eps), e the
exclusive coefficient and g the gate (XSA, arXiv 2603.09078):

    a = (y.w) / n^2,    u = y - e a w,    out = g * u

Backward reads `along`, which is a in float32, and out. Where the gate wants a gradient, or where
excluding goes with a gate for each channel, it reads `ungated`, which is u, in place of out: an out
of 0 says nothing of u. With du = g * dout, c = du.w, and (t, K) = (du, u) or (dout, out):

    d_exclusive = -a c,    d_gate = dout * u,    d_y = du - e c / n^2 w,    d_y.y = t.K
    d_w = -e (a du + (t.w) / n^2 K + c a / n^2 (e - 2 [|w| > eps]) w)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.checks import describe, real
from resformer_kernels._core.coefficients import check_coefficient, check_factor

_LEAST, _MOST = 1e-18, 1e18
"""Numbers whose squares float32 holds."""


def check_epilogue(
    exclusive: Any, eps: Any, gate: Any, q: Tensor, value_dim: int, kv_heads: int
) -> dict[str, Any]:
    """The fields of a call's record that say what follows the softmax, by name.

    Tensors get q's rank, with axes of size 1 where they broadcast.
    """
    heads: dict[str, Any] = {"of": "q", "heads": "query", "other_heads": kv_heads}
    part, number = None, 0.0
    if exclusive is not None:
        rows, onto = (*q.shape[:-1], 1), "a number for each query and head"
        part, number = check_coefficient("exclusive", exclusive, q, shape=rows, onto=onto, **heads)
    if gate is not None:
        if not isinstance(gate, Tensor):
            raise TypeError(f"out_gate must be a tensor or None, got {describe(gate)}")
        full, onto = (*q.shape[:-1], value_dim), "the output's shape"
        gate = check_factor("out_gate", gate, q, shape=full, onto=onto, **heads)
    return {
        "exclusive": part,
        "exclusive_value": number,
        "exclusive_eps": _check_eps(eps),
        "out_gate": gate,
    }


def _check_eps(eps: Any) -> float:
    """A bound that can be squared; None: 1e-6. It is no default of the public functions, as
    torch.compile(dynamic=True) makes a float default an input, which fails inside a checkpoint."""
    if eps is None:
        return 1e-6
    eps = real("exclusive_eps", eps)
    if not _LEAST <= eps <= _MOST:
        raise ValueError(f"exclusive_eps must be from {_LEAST} to {_MOST}, got {eps}")
    return float(eps)


def keeping(call: Any) -> Any:
    """The record of a call whose gradient is wanted, asking forward for what backward reads."""
    gate = call.out_gate
    ungated = gate is not None and (gate.requires_grad or (call.excludes and gate.shape[-1] != 1))
    return call._replace(return_along=call.excludes, return_ungated=ungated)
