"""Value-residual attention in plain PyTorch: slow, obvious, and the definition of correct.

    V' = lambda_v * v + lambda_first * v_first                     (arXiv 2410.17897, ResFormer)
    S  = softcap(scale * q k^T) + bias, and -inf where attention may not go
    LSE = log(exp(sink) + sum_j exp(S_j)),   y = exp(S - LSE) V'
    out = gate * (y - exclusive * (y . w) / max(|w|, eps)^2 * w),   w = V' at the query's position
                                                                    (arXiv 2603.09078, XSA)

It computes in float64 for float64 inputs and in float32 for all others, and rounds V' once to v's
dtype. It is differentiable by autograd as it stands and materialises (B, Hq, Tq, Tk) scores.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from resformer_kernels._core.hardware import Hardware
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.shared import allowed_positions as allowed_positions

NAME = "reference"

Attend = Callable[[AttentionCall, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_LARGE = 2**24


def unsupported_reason(_call: AttentionCall, _hardware: Hardware) -> str | None:
    """None: the reference serves everything."""
    return None


def is_large(call: AttentionCall) -> bool:
    """Whether the scores that it materialises are many enough to be worth a warning."""
    batch = call.q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
    return batch * call.q.shape[-2] * call.max_seqlen_q * call.max_seqlen_k >= _LARGE


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, mixed value or None), as `AttentionCall` asks."""
    return run_with(attend, call)


def run_with(attend: Attend, call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`run`, with another way to attend over (B, T, H, D) tensors than `attend`."""
    kind = call.q.device.type
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        if call.cu_seqlens_q is None:
            return _run_fixed(attend, call)
        return _run_packed(attend, call)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _run_fixed(attend: Attend, call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mixed = mix(call, call.v, call.v_first)
    allowed = allowed_positions(call, call.max_seqlen_q, call.max_seqlen_k, call.q.device)
    y, lse = attend(call, call.q, call.k, mixed, allowed)
    out = finish(call, *placed(call, y, mixed))
    returned = mixed.clone(memory_format=torch.contiguous_format)
    return out, lse if call.return_lse else None, returned if call.return_mixed_value else None


def _run_packed(attend: Attend, call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    cu_q, cu_k = call.cu_seqlens_q, call.cu_seqlens_k
    assert cu_q is not None
    assert cu_k is not None
    # Tokens after the last sequence may hold anything, NaN included: they become zeros before
    # any arithmetic, for a gradient of zero times NaN is NaN.
    inside = torch.arange(call.k.shape[0], device=cu_k.device) < cu_k[-1]
    inside = inside[:, None, None]
    values = [x if x is None else x.masked_fill(~inside, 0) for x in (call.v, call.v_first)]
    mixed = mix(call, values[0], values[1]).masked_fill(~inside, 0)

    rows_k = _rows(cu_k, call.max_seqlen_k, call.k.shape[0])
    y, lse = attend(
        call,
        _take(call.q, _rows(cu_q, call.max_seqlen_q, call.q.shape[0])),
        _take(call.k, rows_k),
        _take(mixed, rows_k),
        allowed_positions(
            call, cu_q.diff()[:, None, None, None], cu_k.diff()[:, None, None, None], cu_q.device
        ),
    )
    back = _rows_back(cu_q, call.max_seqlen_q, call.q.shape[0])
    y = _take(y.flatten(0, 1), back)
    out = finish(closed(call), *placed(call, y, mixed))[0]
    lse = _take(lse.transpose(1, 2).flatten(0, 1), back, fill=-torch.inf).transpose(0, 1)
    return (
        out,
        lse.contiguous() if call.return_lse else None,
        mixed if call.return_mixed_value else None,
    )


def _rows(cu_seqlens: Tensor, longest: int, total: int) -> Tensor:
    """(batch, longest): the packed row of each token; `total` where a sequence is shorter."""
    steps = torch.arange(longest, device=cu_seqlens.device)
    rows = cu_seqlens[:-1, None] + steps
    return torch.where(rows < cu_seqlens[1:, None], rows, total)


def _rows_back(cu_seqlens: Tensor, longest: int, total: int) -> Tensor:
    """(total,): where each packed row lies in (batch * longest); that product for rows outside."""
    rows = torch.arange(total, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    batch = cu_seqlens.shape[0] - 1
    return torch.where(
        rows < cu_seqlens[-1], owner * longest + rows - cu_seqlens[owner], batch * longest
    )


def _take(x: Tensor, rows: Tensor, fill: float = 0.0) -> Tensor:
    """x[rows], where the row after the last one holds `fill`."""
    return torch.cat([x, x.new_full((1, *x.shape[1:]), fill)])[rows]


def mix(call: AttentionCall, v: Tensor | None, v_first: Tensor | None) -> Tensor:
    """V' = lambda_v * v + lambda_first * v_first, in v's dtype."""
    if v is None or v_first is None:
        value = v if v is not None else v_first
        assert value is not None
        return value
    compute = _compute_dtype(v.dtype)
    own = call.lambda_v_value if call.lambda_v is None else call.lambda_v.to(compute)
    first = call.lambda_first_value if call.lambda_first is None else call.lambda_first.to(compute)
    return (own * v.to(compute) + first * v_first.to(compute)).to(v.dtype)


def placed(call: AttentionCall, y: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y (B, Tq, Hq, Dv), V' (B, Tk, Hkv, Dv), at): `at` (1, Tq) is the key at each query's own
    position, below 0 where there is none. What is packed is one batch entry."""
    cu_q, cu_k = call.cu_seqlens_q, call.cu_seqlens_k
    rows = torch.arange(call.q.shape[-3], device=y.device)
    if cu_q is None or cu_k is None:
        return y, value, (rows + (call.max_seqlen_k - call.max_seqlen_q))[None]
    if cu_q.shape[0] == 1:
        return y[None], value[None], torch.full_like(rows, -1)[None]
    owner = torch.searchsorted(cu_q[1:].contiguous(), rows, right=True)
    owner = owner.clamp(max=cu_q.shape[0] - 2)
    at = rows + (cu_k[1:] - cu_q[1:])[owner]
    there = (rows < cu_q[-1]) & (at >= cu_k[owner])
    return y[None], value[None], torch.where(there, at, -1)[None]


def closed(call: AttentionCall) -> AttentionCall:
    """The call with exclusive and out_gate of zeros after the last packed sequence."""
    if call.cu_seqlens_q is None:
        return call
    after = torch.arange(call.q.shape[0], device=call.q.device) >= call.cu_seqlens_q[-1]
    exclusive, gate = (
        x if x is None else x.masked_fill(after[:, None, None], 0)
        for x in (call.exclusive, call.out_gate)
    )
    return call._replace(exclusive=exclusive, out_gate=gate)


def own_values(value: Tensor, at: Tensor, y: Tensor) -> Tensor:
    """(B, Tq, Hq, Dv), in y's dtype: V' at each query's own position, zeros where there is none."""
    # The row after the last one stands for a position without a key.
    nothing = value.new_zeros(value.shape[0], 1, *value.shape[2:])
    rows = torch.cat([value, nothing], dim=1)
    batch = torch.arange(value.shape[0], device=value.device)[:, None]
    own = rows[batch, at.clamp(min=-1)].to(y.dtype)
    return own.repeat_interleave(y.shape[2] // value.shape[2], dim=2)


def finish(call: AttentionCall, y: Tensor, value: Tensor, at: Tensor) -> Tensor:
    """out (B, Tq, Hq, Dv) in q's dtype, of y that was not rounded yet: see `placed`."""
    if call.excludes:
        own = own_values(value, at, y)
        size = own.square().sum(-1, keepdim=True).clamp(min=call.exclusive_eps**2)
        along = (y * own).sum(-1, keepdim=True) / size
        part = call.exclusive_value if call.exclusive is None else call.exclusive.to(y.dtype)
        y = y - part * along * own
    if call.out_gate is not None:
        y = call.out_gate.to(y.dtype) * y
    return y.to(call.q.dtype)


def scores(call: AttentionCall, q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """S (B, Hq, Tq, Tk): scale, softcap, bias and mask, in that order; -inf where masked."""
    compute = _compute_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    queries = q.to(compute).transpose(1, 2)
    keys = k.to(compute).transpose(1, 2).repeat_interleave(group, dim=1)
    s = call.scale * (queries @ keys.transpose(-1, -2))
    if call.softcap > 0:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.attn_bias is not None:
        if call.attn_bias.dtype is torch.bool:
            allowed = allowed & call.attn_bias
        else:
            s = s + call.attn_bias.to(compute)
    return s.masked_fill(~allowed, -torch.inf)


def attend(
    call: AttentionCall, q: Tensor, k: Tensor, value: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """(y (B, Tq, Hq, Dv), not rounded yet, lse (B, Hq, Tq)) of (B, T, H, D) arguments."""
    s = scores(call, q, k, allowed)
    # A row without keys has no maximum: -inf stands in, and 0 stands in for that.
    peak = torch.cat([s, s.new_full((*s.shape[:-1], 1), -torch.inf)], dim=-1).amax(-1)
    sink = None
    if call.sinks is not None:
        sink = call.sinks.to(s.dtype)[:, None]
        peak = torch.maximum(peak, sink)
    peak = peak.detach()
    peak = peak.masked_fill(peak == -torch.inf, 0)
    weights = torch.exp(s - peak[..., None])
    total = weights.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    group = q.shape[2] // k.shape[2]
    values = value.to(s.dtype).transpose(1, 2).repeat_interleave(group, dim=1)
    out = (weights / total[..., None]) @ values
    lse = (peak + total.log()).masked_fill(empty, -torch.inf)
    return out.transpose(1, 2).contiguous(), lse


def attend_by_lse(
    call: AttentionCall, q: Tensor, k: Tensor, value: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """`attend`, whose gradient sees only out and the LSE, as that of a memory-linear kernel does.

    Weights are exp(S - LSE), the normaliser's gradient is sum(dO O), of rounded LSE and out. The
    same function, with the rounding errors that such kernels cannot avoid: see `testing`.
    """
    with torch.no_grad():
        _, lse = attend(call, q, k, value, allowed)
    s = scores(call, q, k, allowed)
    base = lse.masked_fill(lse == -torch.inf, 0)
    weights = torch.exp(s - base[..., None])
    total = weights.sum(-1)
    if call.sinks is not None:
        total = total + torch.exp(call.sinks.to(s.dtype)[:, None] - base)
    # Zero in value; its gradient is that of the LSE, for d LSE / d S = exp(S - LSE).
    drift = total - total.detach()
    group = q.shape[2] // k.shape[2]
    values = value.to(s.dtype).transpose(1, 2).repeat_interleave(group, dim=1)
    kept = (weights @ values).to(q.dtype).to(s.dtype)
    out = kept * torch.exp(-drift)[..., None]
    return out.transpose(1, 2).contiguous(), lse + drift
