"""Behaviour of every backend, and the native one's promises about bits, streams and strides."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resformer_kernels import explain, linear_scan
from tests.machinery import saved_bytes, threads
from tests.scan.by_hand import scan_by_hand
from tests.scan.cases import DTYPES, Case, inputs_of, run

KINDS = ("decay", "unit", "switch")


# Narrow and long: time itself is split over threads from 4096 steps per thread on.
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("constant", [False, True])
def test_same_bits_on_any_number_of_threads(dtype: torch.dtype, kind: str, constant: bool) -> None:
    cases = [
        Case(dtype, 5, batch=1, length=17000, kind=kind, constant=constant),
        Case(dtype, 300, batch=3, length=40, kind=kind, constant=constant, reverse=True),
        Case(dtype, 3, lengths=(9001, 20, 8500), tail=1, kind=kind, constant=constant),
    ]
    for case in cases:
        inputs = inputs_of(case)
        with threads(1):
            alone = run(case, inputs, "native")
        for count in (2, 4):
            with threads(count):
                several = run(case, inputs, "native")
            pairs = zip(alone, several, strict=True)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_million_steps(constant: bool, reverse: bool, native: str) -> None:
    torch.manual_seed(0)
    length = 1_000_003
    gates = torch.rand(3) if constant else torch.rand(length, 3)
    tokens, initial = torch.randn(length, 3), torch.randn(3)
    d_states, d_final = torch.randn(length, 3), torch.randn(3)
    leaves = [gates, tokens[None], initial[None]]
    leaves = [x.requires_grad_() for x in (gates if constant else gates[None], *leaves[1:])]
    with threads(2):
        outputs = linear_scan(*leaves, reverse=reverse, backend=native)
        found = torch.autograd.grad(outputs, leaves, (d_states[None], d_final[None]))
    steps = [gates.detach().expand(length, 3), tokens, d_states]
    steps = [x.flip(0) for x in steps] if reverse else steps
    exact = scan_by_hand(steps[0], steps[1], initial.detach(), steps[2], d_final)
    by_step = [exact.states, exact.d_tokens, exact.d_gates]
    states, d_tokens, d_gates = [x.flip(0) for x in by_step] if reverse else by_step
    pairs = [
        (outputs[0][0], states),
        (outputs[1][0], exact.final),
        (found[0] if constant else found[0][0], d_gates.sum(0) if constant else d_gates),
        (found[1][0], d_tokens),
        (found[2][0], exact.d_initial),
    ]
    for got, true in pairs:
        # A short sum of terms of size 1 may cancel: their rounding errors are left.
        size = max(float(true.norm()), true.numel() ** 0.5)
        assert float((got.detach().double() - true).norm()) <= 3e-7 * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_a_stream_is_one_call(dtype: torch.dtype, native: str, data: st.DataObject) -> None:
    length, reverse = data.draw(st.integers(1, 900)), data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    case = Case(dtype, 7, length=length, constant=data.draw(st.booleans()), reverse=reverse)
    gates, tokens, state = inputs_of(case).leaves
    whole = linear_scan(gates, tokens, state, reverse=reverse, backend=native)
    carried, parts = state, []
    edges = list(zip([0, *cuts], [*cuts, length], strict=True))
    for begin, end in reversed(edges) if reverse else edges:
        part, carried = linear_scan(
            gates if case.constant else gates[:, begin:end],
            tokens[:, begin:end],
            carried,
            reverse=reverse,
            backend=native,
        )
        parts.append(part)
    joined = torch.cat(parts[::-1] if reverse else parts, 1)
    assert torch.equal(joined, whole[0])
    assert torch.equal(carried, whole[1])


@settings(max_examples=25)
@given(
    gate=st.floats(-0.984375, 0.984375, width=32),
    start=st.floats(-10, 10, width=32),
    x=st.floats(-10, 10, width=32),
    length=st.integers(1, 3000),
)
def test_constant_input_follows_the_geometric_series(
    native: str, gate: float, start: float, x: float, length: int
) -> None:
    tokens = torch.full((1, length, 1), x)
    _, final = linear_scan(torch.tensor([gate]), tokens, torch.full((1, 1), start), backend=native)
    expected = gate**length * start + x * (1 - gate**length) / (1 - gate)
    scale = abs(start) + abs(x) / (1 - abs(gate))
    assert abs(final.item() - expected) <= 1e-5 * scale + 1e-30


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["tokens", "gates", "initial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_nan_and_infinity_propagate(
    special: float, where: str, dtype: torch.dtype, kernels: str
) -> None:
    gates, tokens, initial = inputs_of(Case(dtype, 3, length=6)).leaves
    gates[0, 4, 1] = 0.0
    if where == "initial":
        initial[0, 1] = special
    else:
        (tokens if where == "tokens" else gates)[0, 2, 1] = special
    for leaf in (gates, tokens, initial):
        leaf.requires_grad_()
    found = []
    for backend in (kernels, "reference"):
        outputs = linear_scan(gates, tokens, initial, backend=backend)
        grads = tuple(torch.ones_like(x) for x in outputs)
        found.append([*outputs, *torch.autograd.grad(outputs, (gates, tokens, initial), grads)])
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())
        kept = expected.isfinite()
        torch.testing.assert_close(got[kept], expected[kept])


@pytest.mark.parametrize("gate", [0.0, 1.0, 2.0])
def test_gates_of_nothing_everything_and_more(gate: float, kernels: str) -> None:
    tokens = torch.arange(1.0, 7.0).view(1, 6, 1)
    states, final = linear_scan(torch.tensor([gate]), tokens, backend=kernels)
    expected = {
        0.0: [1, 2, 3, 4, 5, 6],
        1.0: [1, 3, 6, 10, 15, 21],
        2.0: [1, 4, 11, 26, 57, 120],
    }[gate]
    assert states.flatten().tolist() == expected
    assert final.item() == expected[-1]


def test_what_lies_after_the_last_sequence_changes_nothing(kernels: str) -> None:
    for reverse in (False, True):
        found = []
        for rest in (0.0, float("nan")):
            case = Case(torch.float32, 3, lengths=(4, 3), tail=2, reverse=reverse)
            inputs = inputs_of(case)
            for leaf in inputs.leaves[:2]:
                leaf[-2:] = rest
            found.append(run(case, inputs, kernels))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert not found[0][0][-2:].any()
        assert not found[0][2][-2:].any()


def test_only_a_strided_last_axis_is_copied(native: str) -> None:
    x = torch.randn(2, 5, 4)
    assert explain(linear_scan, x[:, ::2], x[:, 1::2][:, :2].repeat(1, 2, 1)[:, :3]).notes == []
    (note,) = explain(linear_scan, torch.rand(4, 2)[:, 0], x, backend=native).notes
    assert note.startswith("gates is copied once")


def test_inputs_are_untouched_and_outputs_no_alias(backend: str) -> None:
    x, state = torch.randn(1, 3, 4), torch.randn(1, 4)
    before = [x.clone(), state.clone()]
    states, _ = linear_scan(torch.ones(4), x, state, backend=backend)
    _, final = linear_scan(torch.ones(4), x[:, :0], state, backend=backend)
    assert torch.equal(final, state)
    final.zero_()
    states.zero_()
    assert torch.equal(x, before[0])
    assert torch.equal(state, before[1])


def test_states_are_saved_for_a_gradient_of_the_gates_alone(kernels: str) -> None:
    tokens = torch.randn(1, 4, 64, requires_grad=True)
    states = tokens.untyped_storage().nbytes()
    fixed, learned = (
        saved_bytes(functools.partial(linear_scan, gates, tokens, backend=kernels))
        for gates in (torch.rand(64), torch.rand(64, requires_grad=True))
    )
    assert fixed < states
    assert states < learned <= states + 64 * 4


def test_a_gradient_of_the_tokens_alone(kernels: str) -> None:
    tokens = torch.randn(1, 4, 64, requires_grad=True)
    states, _ = linear_scan(torch.ones(64), tokens, backend=kernels)
    (found,) = torch.autograd.grad(states.sum(), tokens)
    assert torch.equal(found[0, :, 0], torch.tensor([4.0, 3.0, 2.0, 1.0]))


@pytest.mark.slow
def test_more_elements_than_an_int32_counts(native: str) -> None:
    length, channels = 2**20 + 1, 2048
    tokens = torch.zeros(1, dtype=torch.bfloat16).expand(1, length, channels)
    states, final = linear_scan(
        torch.ones(channels), tokens, torch.ones(1, channels), backend=native
    )
    assert torch.equal(states[0, -1], torch.ones(channels).bfloat16())
    assert torch.equal(final, torch.ones(1, channels))
