"""The reference against the recurrence written out; its gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from resformer_kernels import linear_scan
from tests.scan.by_hand import scan_by_hand

WIDE = (torch.float64, torch.complex128)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_is_the_recurrence_written_out(dtype: torch.dtype, invariant: bool, reverse: bool) -> None:
    gates = leaf(3, dtype=dtype) if invariant else leaf(2, 7, 3, dtype=dtype)
    tokens, initial = leaf(2, 7, 3, dtype=dtype), leaf(2, 3, dtype=dtype)
    d_states, d_final = torch.randn(2, 7, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    states, final = linear_scan(gates, tokens, initial, reverse=reverse)
    d_gates, d_tokens, d_initial = torch.autograd.grad(
        (states, final), (gates, tokens, initial), (d_states, d_final)
    )
    every, steps = gates.expand(2, 7, 3).detach(), tokens.detach()
    axes = (1,) if reverse else ()
    if reverse:
        every, steps, d_states = every.flip(1), steps.flip(1), d_states.flip(1)
    found = [
        scan_by_hand(every[b], steps[b], initial[b].detach(), d_states[b], d_final[b])
        for b in range(2)
    ]
    stacked = [torch.stack(parts) for parts in zip(*found, strict=True)]
    by_step = [stacked[i].flip(axes) if axes else stacked[i] for i in (0, 2, 3)]
    expected_gates = by_step[1].sum((0, 1)) if invariant else by_step[1]
    pairs = [
        (states, by_step[0]),
        (final, stacked[1]),
        (d_gates, expected_gates),
        (d_tokens, by_step[2]),
        (d_initial, stacked[4]),
    ]
    for got, expected in pairs:
        torch.testing.assert_close(got.detach(), expected)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(dtype: torch.dtype, invariant: bool, reverse: bool, packed: bool) -> None:
    shape = (7, 2) if packed else (2, 4, 2)
    cu_seqlens = torch.tensor([0, 2, 2, 6], dtype=torch.int32) if packed else None
    gates = leaf(2, dtype=dtype) if invariant else leaf(*shape, dtype=dtype)
    leaves = (gates, leaf(*shape, dtype=dtype), leaf(3 if packed else 2, 2, dtype=dtype))

    def scan(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return linear_scan(*leaves, reverse=reverse, cu_seqlens=cu_seqlens)

    assert gradcheck(scan, leaves)
    assert gradgradcheck(scan, leaves)


@settings(max_examples=30)
@given(
    gate=st.floats(-0.99, 0.99),
    start=st.floats(-10, 10),
    x=st.floats(-10, 10),
    t=st.integers(1, 60),
)
def test_constant_input_follows_the_geometric_series(
    gate: float, start: float, x: float, t: int
) -> None:
    tokens = torch.full((1, t, 1), x, dtype=torch.float64)
    gates = torch.tensor([gate], dtype=torch.float64)
    _, final = linear_scan(gates, tokens, torch.full((1, 1), start, dtype=torch.float64))
    expected = gate**t * start + x * (1 - gate**t) / (1 - gate)
    assert final.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_each_sequence_alone(reverse: bool) -> None:
    lengths = (3, 0, 5, 1, 0)
    cu_seqlens = torch.tensor([0, 3, 3, 8, 9, 9], dtype=torch.int32)
    gates, tokens, initial = torch.randn(12, 4), torch.randn(12, 4), torch.randn(5, 4)
    states, final = linear_scan(
        gates, tokens, initial, reverse=reverse, cu_seqlens=cu_seqlens, backend="reference"
    )
    at = 0
    for s, length in enumerate(lengths):
        rows = slice(at, at + length)
        alone, last = linear_scan(
            gates[None, rows],
            tokens[None, rows],
            initial[s : s + 1],
            reverse=reverse,
            backend="reference",
        )
        assert torch.equal(states[rows], alone[0])
        assert torch.equal(final[s], last[0])
        at += length
    assert not states[9:].any()


def test_sixteen_bits_are_accumulated_in_float32_and_rounded_once() -> None:
    tokens = torch.randn(1, 200, 4).bfloat16()
    gates = torch.full((4,), 0.99)
    states, final = linear_scan(gates, tokens, backend="reference")
    exact, last = linear_scan(gates.double(), tokens.double())
    assert states.dtype is torch.bfloat16
    assert final.dtype is torch.float32
    assert ((states.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()
    torch.testing.assert_close(final.double(), last, rtol=1e-5, atol=1e-5)
