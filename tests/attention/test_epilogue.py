"""Exclusive self-attention and the output gate against the same steps as separate passes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import value_residual_attention, value_residual_attention_varlen

H, HKV, D, DV = 4, 2, 16, 12
FORMS = [(), (H, 1), (2, 9, 1, 1), (2, 9, H, 1)]
GATES = [(H, 1), (2, 9, H, 1), (2, 9, H, DV), (H, DV)]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(
    q_len: int = 9, k_len: int = 9, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """q, k, v, v_first."""
    shapes = [(2, q_len, H, D), (2, k_len, HKV, D), (2, k_len, HKV, DV), (2, k_len, HKV, DV)]
    return tuple(rand(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes, 1))


def separately(y: Tensor, mixed: Tensor, exclusive: Any, gate: Any, eps: float = 1e-6) -> Tensor:
    """gate * (y - exclusive * (y.w) / max(|w|, eps)^2 * w), one query at a time."""
    rows = []
    for i in range(y.shape[1]):
        at = i + mixed.shape[1] - y.shape[1]
        row = y[:, i]
        if at >= 0:
            w = mixed[:, at].repeat_interleave(y.shape[2] // mixed.shape[2], dim=1)
            length = w.norm(dim=-1, keepdim=True).clamp(min=eps)
            share = exclusive
            if isinstance(exclusive, Tensor):
                share = exclusive.expand(*y.shape[:-1], 1)[:, i]
            row = row - share * (row * w).sum(-1, keepdim=True) / length**2 * w
        rows.append(row)
    out = torch.stack(rows, 1)
    return out if gate is None else gate * out


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("q_len", "k_len"), [(9, 9), (9, 14), (9, 4)])
@pytest.mark.parametrize("place", range(4))
def test_values_and_gradients_of_the_reference(place: int, q_len: int, k_len: int) -> None:
    leaves = [x.requires_grad_() for x in operands(q_len, k_len, torch.float64)]
    leaves += [rand(*FORMS[place], seed=7, dtype=torch.float64).requires_grad_()]
    leaves += [rand(*GATES[place], seed=8, dtype=torch.float64).requires_grad_()]
    options: dict[str, Any] = {"causal": True, "backend": "reference"}
    *inputs, exclusive, gate = leaves
    y, mixed = value_residual_attention(*inputs, return_mixed_value=True, **options)
    expected = separately(y, mixed, exclusive, gate)
    found = value_residual_attention(*inputs, exclusive=exclusive, out_gate=gate, **options)
    close(found, expected, 1e-12)
    grad = rand(*found.shape, seed=9, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(x, leaves, grad) for x in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-10)


def test_gradcheck() -> None:
    leaves = [x[:1, :5].detach().requires_grad_() for x in operands(6, 6, torch.float64)]
    leaves += [rand(1, 5, H, 1, seed=7, dtype=torch.float64).requires_grad_()]
    leaves += [rand(1, 5, H, DV, seed=8, dtype=torch.float64).requires_grad_()]

    def attend(q: Tensor, k: Tensor, v: Tensor, v_first: Tensor, e: Tensor, gate: Tensor) -> Any:
        return value_residual_attention(
            q, k, v, v_first, 0.4, -0.7, causal=True, exclusive=e, out_gate=gate,
            backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, leaves)


def test_all_that_lies_along_the_own_value_is_taken(backend: str) -> None:
    q, k, v, v_first = operands()
    out, mixed = value_residual_attention(
        q, k, v, v_first, exclusive=1.0, return_mixed_value=True, backend=backend
    )
    own = mixed.repeat_interleave(H // HKV, dim=2)
    close((out * own).sum(-1), torch.zeros(2, 9, H), 1e-5)


def test_nothing_taken_is_the_plain_call(backend: str) -> None:
    arguments = operands()
    plain = value_residual_attention(*arguments, backend=backend)
    for exclusive in (None, 0.0, 0):
        found = value_residual_attention(*arguments, exclusive=exclusive, backend=backend)
        assert torch.equal(found, plain)
    ones = torch.ones(H, 1)
    assert torch.equal(value_residual_attention(*arguments, out_gate=ones, backend=backend), plain)


def test_lse_and_mixed_value_are_those_of_the_softmax(backend: str) -> None:
    options: dict[str, Any] = {"return_lse": True, "return_mixed_value": True, "backend": backend}
    _, lse, mixed = value_residual_attention(*operands(), **options)
    _, found_lse, found_mixed = value_residual_attention(
        *operands(), exclusive=1.0, out_gate=rand(H, 1), **options
    )
    assert torch.equal(found_lse, lse)
    assert torch.equal(found_mixed, mixed)


def test_a_mask_that_hides_the_own_position_changes_nothing(backend: str) -> None:
    q, k, v, v_first = operands()
    hidden = ~torch.eye(9, dtype=torch.bool)
    options: dict[str, Any] = {"attn_bias": hidden, "backend": backend}
    y, mixed = value_residual_attention(q, k, v, v_first, return_mixed_value=True, **options)
    found = value_residual_attention(q, k, v, v_first, exclusive=0.7, **options)
    close(found, separately(y, mixed, 0.7, None), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_values_gates_of_zero_and_early_queries(backend: str, dtype: torch.dtype) -> None:
    """Rows without an own value, values of zeros and gates of 0 have finite results and gradients;
    the gate's own is that of the separate passes where the gate is 0."""
    leaves = [x.detach() for x in operands(12, 7, dtype)]
    leaves[2][:, 2:4] = leaves[3][:, 2:4] = 0
    gate = rand(2, 12, H, 1, seed=8, dtype=dtype)
    gate[:, ::2] = 0
    leaves = [x.requires_grad_() for x in (*leaves, rand(2, 12, H, 1, seed=7, dtype=dtype), gate)]

    def gradients(wanted: str, factor: torch.dtype) -> tuple[Tensor, ...]:
        given = [x.detach().to(factor).requires_grad_() for x in leaves]
        out = value_residual_attention(
            *given[:4], exclusive=given[4], out_gate=given[5], causal=True, backend=wanted
        )
        return (out, *torch.autograd.grad(out, given, rand(*out.shape, seed=9).to(factor)))

    found = gradients(backend, dtype)
    exact = gradients("reference", torch.float64)
    tolerance = 2e-5 if dtype is torch.float32 else 4e-2
    for a, b in zip(found, exact, strict=True):
        assert a.isfinite().all()
        close(a.double(), b, tolerance)
    assert found[-1][:, ::2].abs().sum() > 0


def test_packed_sequences_are_each_their_own(backend: str) -> None:
    lengths = [(5, 9), (8, 3), (0, 4), (6, 0), (11, 11)]
    total_q, total_k = (sum(pair[i] for pair in lengths) for i in (0, 1))
    q, k = rand(total_q, H, D, seed=1), rand(total_k, HKV, D, seed=2)
    v, exclusive, gate = rand(total_k, HKV, DV, seed=3), rand(total_q, H, 1, seed=4), rand(H, 1)
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(pair[i] for pair in lengths)], dtype=torch.int32)
        for i in (0, 1)
    )
    found = value_residual_attention_varlen(
        *(q, k, v), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=11, max_seqlen_k=11,
        causal=True, exclusive=exclusive, out_gate=gate, backend=backend,
    )  # fmt: skip
    for b in range(len(lengths)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = value_residual_attention(
            *(x[None] for x in (q[rows], k[keys], v[keys])),
            causal=True, exclusive=exclusive[rows], out_gate=gate, backend=backend,
        )  # fmt: skip
        close(found[rows], alone[0], 1e-6)


def test_coefficients_are_read_in_place(backend: str) -> None:
    """Heads before time, and every other channel."""
    arguments = operands()
    exclusive, gate = rand(2, H, 9, 1).transpose(1, 2), rand(2, 9, H, 2 * DV)[..., ::2]
    found = value_residual_attention(
        *arguments, exclusive=exclusive, out_gate=gate, backend=backend
    )
    copied = value_residual_attention(
        *arguments, exclusive=exclusive.contiguous(), out_gate=gate.contiguous(), backend=backend
    )
    assert torch.equal(found, copied)


def test_infinite_values_propagate(backend: str) -> None:
    q, k, v, _ = operands()
    v[0, 4, 0, 1] = torch.inf
    found = value_residual_attention(q, k, v, exclusive=1.0, causal=True, backend=backend)
    assert found[0, 4, :2].isnan().all()
    assert found[0, :, 2:].isfinite().all()
    assert found[1].isfinite().all()
