"""The reservoir module: its draws, its memory over calls, and its streamed readout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import reservoir_scan
from resformer_kernels.nn import Reservoir, Ridge
from resformer_kernels.nn import reservoir_weights as weights

FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "csr": {"layout": "csr"},
    "ring": {"topology": "ring"},
    "diagonal": {"topology": "diagonal"},
    "groups": {"groups": 3, "lr": (1.0, 0.3, 0.1), "sr": (0.9, 1.1, 0.5)},
}


def make(units: int = 30, **options: Any) -> Reservoir:
    options = {"rc_connectivity": 0.3, "input_connectivity": 0.8, "seed": 1} | options
    return Reservoir(units, 2, **options)


def drive(batch: int = 2, steps: int = 25) -> Tensor:
    return torch.randn(batch, steps, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS)
def test_states_follow_the_equation(form: str) -> None:
    reservoir = make(bias_scaling=0.2, **FORMS[form])
    u, leak = drive(), reservoir.leak
    states, final = reservoir(u)
    dense, state = reservoir.dense_weight(), torch.zeros(2, 30)
    for t in range(u.shape[1]):
        assert reservoir.bias is not None
        driven = state @ dense.T + u[:, t] @ reservoir.input_weight.T + reservoir.bias
        state = (1 - leak) * state + leak * driven.tanh()
        torch.testing.assert_close(states[:, t], state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(final, state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_spectral_radius_is_as_asked(form: str) -> None:
    reservoir = make(sr=0.7) if form == "dense" else make(**FORMS[form])
    if form == "groups":
        blocks = reservoir.weight
        assert isinstance(blocks, Tensor)
        found = [weights.spectral_radius(block) for block in blocks]
        assert found == pytest.approx([0.9, 1.1, 0.5], abs=1e-6)
    elif form == "diagonal":
        assert 0.6 < reservoir.dense_weight().abs().max() <= 0.9
    else:
        expected = 0.7 if form == "dense" else 0.9
        assert weights.spectral_radius(reservoir.dense_weight()) == pytest.approx(expected, 1e-5)


def test_arnoldi_finds_the_spectral_radius_of_a_large_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = torch.randn(350, 350, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = weights.spectral_radius(matrix)
    monkeypatch.setattr(weights, "_DENSE_EIGENVALUES", 10)
    assert weights.spectral_radius(matrix) == pytest.approx(exact, 1e-6)
    # A Krylov space of one dimension: that of a multiple of the identity.
    assert weights.spectral_radius(3 * torch.eye(400)) == pytest.approx(3.0)
    with pytest.raises(ValueError, match=r"matrix is not finite: nan at \(0, 0\)"):
        weights.spectral_radius(torch.full((2, 2), torch.nan))


def test_draws_have_the_asked_shares_and_sizes() -> None:
    reservoir = Reservoir(
        200, 3, rc_connectivity=0.2, input_connectivity=0.5, input_scaling=(1.0, 2.0, 0.0)
    )
    assert (reservoir.dense_weight() != 0).double().mean() == pytest.approx(0.2, abs=0.02)
    columns = reservoir.input_weight.abs().amax(0).tolist()
    assert columns == [1.0, 2.0, 0.0]
    assert (reservoir.input_weight[:, 0] != 0).double().mean() == pytest.approx(0.5, abs=0.1)
    assert reservoir.bias is None
    again = Reservoir(200, 3, rc_connectivity=0.2)
    assert torch.equal(reservoir.dense_weight(), again.dense_weight())
    assert not torch.equal(
        reservoir.dense_weight(), Reservoir(200, 3, rc_connectivity=0.2, seed=1).dense_weight()
    )


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_trained_and_state_dict_restores(form: str) -> None:
    reservoir, other = make(**FORMS[form]), make(**(FORMS[form] | {"seed": 5}))
    assert not list(reservoir.parameters())
    other.load_state_dict(reservoir.state_dict())
    u = drive()
    torch.testing.assert_close(other(u)[0], reservoir(u)[0])
    assert reservoir.double()(u.double())[0].dtype == torch.float64


def test_stateful_calls_equal_one_call() -> None:
    u = drive(steps=40)
    whole, _ = make()(u)
    reservoir = make(stateful=True)
    assert reservoir.state is None
    parts = [reservoir(part)[0] for part in u.split((1, 13, 0, 26), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    assert "state" not in "".join(reservoir.state_dict())
    with pytest.raises(ValueError, match=r"inputs must hold 2 sequences.*got 3: call reset\(\)"):
        reservoir(drive(batch=3))
    reservoir.reset()
    torch.testing.assert_close(reservoir(u)[0], whole, atol=1e-5, rtol=1e-4)


def test_single_conversations_are_reset() -> None:
    u = drive(batch=3)
    reservoir = make(stateful=True)
    fresh, _ = reservoir(u)
    after, _ = reservoir(u)
    for sequences in (torch.tensor([False, True, False]), torch.tensor([1])):
        reservoir.reset()
        reservoir(u)
        reservoir.reset(sequences)
        mixed, _ = reservoir(u)
        torch.testing.assert_close(mixed[1], fresh[1])
        torch.testing.assert_close(mixed[0], after[0])
    for wrong, error in (
        (torch.tensor([True]), ValueError),
        (torch.tensor([3]), ValueError),
        (torch.tensor([-1]), ValueError),
        ([1], TypeError),
    ):
        with pytest.raises(error, match="sequences must"):
            reservoir.reset(wrong)  # type: ignore[arg-type]
    make(stateful=True).reset(torch.tensor([0]))


def test_gradients_cross_calls_until_detached() -> None:
    u = drive().requires_grad_()
    reservoir = make(stateful=True, keep_graph=True)
    reservoir(u)
    states, _ = reservoir(drive())
    (grad,) = torch.autograd.grad(states.sum(), u)
    assert grad[:, -1].abs().max() > 0
    reservoir.reset()
    reservoir.detach()
    reservoir(u)
    reservoir.detach()
    assert not reservoir(drive())[0].requires_grad


def test_packed_sequences_equal_separate_ones() -> None:
    u = drive(batch=1, steps=30)[0]
    reservoir = make()
    packed, final = reservoir(u, cu_seqlens=torch.tensor([0, 10, 30], dtype=torch.int32))
    torch.testing.assert_close(packed[10:], reservoir(u[None, 10:])[0][0])
    assert final.shape == (2, 30)


def test_streamed_gram_equals_a_fit_on_states() -> None:
    u = drive(steps=120)
    targets = torch.cumsum(u, 1)[..., :1].double() + 3
    reservoir = make()
    states, final = reservoir(u)
    expected = Ridge(30, 1, 1e-2).fit(states[:, 20:], targets[:, 20:])
    readout = Ridge(30, 1, 1e-2)
    state = reservoir.stream(readout, u, targets, washout=20)
    readout.solve()
    torch.testing.assert_close(readout.weight, expected.weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(readout.bias, expected.bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state, final, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"washout must lie in \[0, 120\], got 121"):
        reservoir.stream(readout, u, targets, washout=121)


def test_free_run_feeds_outputs_back() -> None:
    reservoir = make(stateful=True).double()
    readout = Ridge(30, 2).fit(torch.randn(50, 30).double(), torch.randn(50, 2).double())
    start = torch.rand(2, 30, dtype=torch.float64)
    outputs, last = reservoir.free_run(readout, start, 3)
    assert reservoir.state is None
    state = start
    for t in range(3):
        torch.testing.assert_close(outputs[:, t], readout(state))
        _, state = reservoir(outputs[:, t : t + 1], state)
    torch.testing.assert_close(last, state)


def test_unbounded_activations_that_may_grow_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="'relu' is unbounded.*lower sr"):
        make(activation="relu", sr=1.5)
    make(activation="identity", sr=0.9)
    # A leak moves the eigenvalues towards 1; tanh is bounded for all eigenvalues.
    with pytest.warns(UserWarning, match="'identity' is unbounded"):
        make(activation="identity", sr=1.0, topology="ring", lr=0.5)
    with pytest.warns(UserWarning, match="'softplus' is unbounded"):
        make(activation="softplus", sr=1.5)
    for bounded in ("tanh", "sigmoid", "softmax"):
        make(sr=1.5, activation=bounded)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "softmax"])
def test_activations_of_reservoirpy(activation: str, form: str) -> None:
    reservoir = make(bias_scaling=0.2, activation=activation, **(FORMS[form] | {"sr": 0.5}))
    groups = reservoir.groups
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": lambda z: 1 / (1 + (-z).exp()),
        "softplus": lambda z: (1 + z.exp()).log(),
        "softmax": lambda z: z.unflatten(1, (groups, -1)).softmax(-1).flatten(1),
    }
    u, state = drive(), torch.zeros(2, 30)
    states, _ = reservoir(u)
    assert reservoir.bias is not None
    for t in range(u.shape[1]):
        z = state @ reservoir.dense_weight().T + u[:, t] @ reservoir.input_weight.T + reservoir.bias
        state = (1 - reservoir.leak) * state + reservoir.leak * functions[activation](z)
        torch.testing.assert_close(states[:, t], state, atol=1e-5, rtol=1e-4)


def test_it_is_the_op() -> None:
    reservoir = make(lr=0.3)
    u = drive()
    expected, _ = reservoir_scan(
        u, reservoir.weight, input_weight=reservoir.input_weight, leak=reservoir.leak
    )
    assert torch.equal(reservoir(u)[0], expected)


def test_a_series_that_is_not_finite_is_refused_before_anything_changes() -> None:
    reservoir, readout = make(stateful=True), Ridge(30, 1)
    u, y = drive(), drive()[..., :1]
    reservoir.stream(readout, u, y)
    before, count = reservoir.state, readout.count
    for bad in (torch.nan, torch.inf, -torch.inf):
        series, targets = u.clone(), y.clone()
        series[1, 7, 0] = targets[0, 9, 0] = bad
        with pytest.raises(ValueError, match=rf"inputs is not finite: {bad} at \(1, 7, 0\)"):
            reservoir.stream(readout, series, y, washout=2)
        with pytest.raises(ValueError, match=rf"targets is not finite: {bad} at \(0, 9, 0\)"):
            reservoir.stream(readout, u, targets, washout=2)
        assert reservoir.state is before
        assert readout.count == count
    # A washout needs no targets.
    reservoir.stream(readout, u, targets, washout=10)
    grown = make(activation="identity", input_connectivity=1.0)
    grown._values *= 1e30
    with pytest.raises(ValueError, match="gram is not finite"):
        grown.stream(readout, u, y)
    assert readout.solve().weight.isfinite().all()
