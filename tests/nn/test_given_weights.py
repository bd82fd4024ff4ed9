"""Reservoirs with the user's own weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resformer_kernels import RingWeight
from resformer_kernels.nn import Reservoir
from resformer_kernels.nn import reservoir_weights as weights
from tests.nn.loops import FORMS, draw, forced

SPARSE = draw(12, 12) * (draw(12, 12, seed=1) > 0.5)
WIN, WFB, BIAS = draw(12, 2, seed=2), draw(12, 3, seed=3), draw(12, seed=4)


def twice(weight: Tensor) -> Tensor:
    """An uncoalesced COO tensor: every entry in two parts, in no order."""
    places, values = weight.to_sparse().indices(), weight.to_sparse().values()
    parts = torch.cat((0.25 * values, 0.75 * values)).flip(0)
    return torch.sparse_coo_tensor(
        torch.cat((places, places), 1).flip(1), parts, weight.shape, check_invariants=True
    )


def of_scipy(form: str) -> Callable[[Tensor], Any]:
    def made(weight: Tensor) -> Any:
        sparse = pytest.importorskip("scipy.sparse")
        return getattr(sparse, form)(weight.numpy())

    return made


DENSE: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda w: w,
    "float32": lambda w: w.float(),
    "strided": lambda w: w.T.contiguous().T,
    "numpy": lambda w: w.numpy(),
    "lists": lambda w: w.tolist(),
}
LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)
SPARSE_FORMS: dict[str, Callable[[Tensor], Any]] = {
    **{str(x): lambda w, x=x: w.to_sparse(layout=x) for x in LAYOUTS},  # type: ignore[misc]
    "bsr": lambda w: w.to_sparse_bsr((3, 3)),
    "twice": twice,
    **{x: of_scipy(f"{x}_matrix") for x in ("csr", "csc", "coo", "lil", "dok", "bsr", "dia")},
    "csr_array": of_scipy("csr_array"),
}


@pytest.mark.parametrize("form", [*DENSE, *SPARSE_FORMS])
@pytest.mark.filterwarnings("ignore:Sparse CS")
def test_every_form_of_a_matrix_is_taken(form: str) -> None:
    given = (DENSE | SPARSE_FORMS)[form]
    reservoir = Reservoir(W=given(SPARSE), Win=WIN, Wfb=WFB, bias=BIAS, lr=0.4, dtype=torch.float64)
    assert (reservoir.units, reservoir.input_dim, reservoir.feedback_dim) == (12, 2, 3)
    assert reservoir.layout == ("csr" if form in SPARSE_FORMS else "dense")
    close = 1e-6 if form == "float32" else 1e-15
    torch.testing.assert_close(reservoir.dense_weight(), SPARSE, atol=close, rtol=close)
    u, y = draw(2, 9, 2), draw(2, 9, 3, seed=1)
    states, _ = reservoir(u, teacher=y)
    torch.testing.assert_close(states, forced(reservoir, u, y))
    # W_in, W_fb and b may come in these forms too; W_in and W_fb are held dense.
    other = Reservoir(12, W=SPARSE, Win=given(SPARSE), Wfb=given(SPARSE), dtype=torch.float64)
    torch.testing.assert_close(other.input_weight, SPARSE, atol=close, rtol=close)
    torch.testing.assert_close(other.feedback_weight, SPARSE, atol=close, rtol=close)


def test_blocks_diagonals_and_rings_are_taken() -> None:
    blocks, values, source = draw(3, 4, 4), draw(12), torch.randperm(12)
    ring = torch.zeros(12, 12, dtype=torch.float64)
    ring[torch.arange(12), source] = values
    options: dict[str, Any] = {"Win": WIN, "dtype": torch.float64}
    for given, form, dense in (
        (blocks, ("random", 3), torch.block_diag(*blocks)),
        (values.numpy(), ("diagonal", 1), torch.diag(values)),
        (RingWeight(values), ("ring", 1), torch.diag(values).roll(-1, 1)),
        (RingWeight(values, source), ("ring", 1), ring),
    ):
        reservoir = Reservoir(W=given, Wfb=WFB, **options)
        assert (reservoir.topology, reservoir.groups) == form
        assert reservoir.units == 12
        torch.testing.assert_close(reservoir.dense_weight(), dense)
        y = draw(2, 7, 3)
        states, _ = reservoir(y[..., :2], teacher=y)
        torch.testing.assert_close(states, forced(reservoir, y[..., :2], y))
        filled = Reservoir(W=given, Wfb=WFB, seed=3, **options)
        filled.load_state_dict(reservoir.state_dict())
        assert torch.equal(filled(y[..., :2], teacher=y)[0], states)
    # Each group has a leak of its own.
    assert Reservoir(W=blocks, Win=WIN, lr=(1.0, 0.5, 0.2)).leak.shape == (12,)


def test_a_given_weight_is_taken_as_it_is_or_scaled_as_asked() -> None:
    plain = Reservoir(W=SPARSE, input_dim=1, dtype=torch.float64)
    assert torch.equal(plain.dense_weight(), SPARSE)
    for given in (SPARSE, SPARSE.to_sparse(), RingWeight(BIAS), BIAS):
        reservoir = Reservoir(W=given, input_dim=1, sr=0.5, dtype=torch.float64)
        assert weights.spectral_radius(reservoir.dense_weight()) == pytest.approx(0.5)
        ratio = reservoir.dense_weight() / Reservoir(W=given, input_dim=1).dense_weight()
        assert ratio.nanmean() == pytest.approx(float(ratio[~ratio.isnan()][0]), 1e-5)
    blocks = Reservoir(W=draw(2, 4, 4), input_dim=1, sr=(0.5, 2.0)).weight
    assert isinstance(blocks, Tensor)
    assert [weights.spectral_radius(b) for b in blocks] == pytest.approx([0.5, 2.0], 1e-5)
    scaled = Reservoir(W=SPARSE, Win=WIN, Wfb=WFB, input_scaling=(2.0, 0.5), fb_scaling=3.0)
    torch.testing.assert_close(scaled.input_weight, (WIN * torch.tensor([2.0, 0.5])).float())
    torch.testing.assert_close(scaled.feedback_weight, (3 * WFB).float())
    assert not Reservoir(W=torch.zeros(3, 3), input_dim=1, sr=0.0).dense_weight().any()


def test_given_weights_are_copied() -> None:
    for dtype in (torch.float32, torch.float64):
        w, win = SPARSE.to(dtype), WIN.to(dtype).numpy()
        reservoir = Reservoir(W=w, Win=win, bias=w[0], dtype=dtype)
        before = [x.clone() for x in reservoir.buffers()]
        w.zero_()
        win[:] = 0
        assert all(torch.equal(x, y) for x, y in zip(reservoir.buffers(), before, strict=True))


def test_what_is_not_given_is_drawn() -> None:
    reservoir = Reservoir(input_dim=2, Wfb=WFB, seed=3, rc_connectivity=0.5)
    assert reservoir.units == 12
    assert weights.spectral_radius(reservoir.dense_weight()) == pytest.approx(0.9, 1e-5)
    drawn = Reservoir(
        40, 0, feedback_dim=2, fb_scaling=(1.0, 0.5), fb_connectivity=0.5, rc_connectivity=0.5
    )
    assert drawn.feedback_weight is not None
    assert drawn.feedback_weight.abs().amax(0).tolist() == [1.0, 0.5]
    assert (drawn.feedback_weight != 0).double().mean() == pytest.approx(0.5, abs=0.2)
    # Feedback weights are drawn last.
    plain = Reservoir(40, 3, bias_scaling=0.1, rc_connectivity=0.5)
    fed = Reservoir(40, 3, bias_scaling=0.1, rc_connectivity=0.5, feedback_dim=2)
    assert "feedback_dim=2" in str(fed)
    for name, buffer in plain.state_dict().items():
        assert torch.equal(fed.state_dict()[name], buffer)
    assert Reservoir(12, 1, bias=0.5).bias is not None
    vector = Reservoir(12, 1, bias=BIAS[:, None]).bias
    assert vector is not None
    assert torch.equal(vector, BIAS.float())
    assert Reservoir(12, 1, bias=0.0).bias is None


SEED_ONE = {
    "dense": (6.445449170376744, 1.0070290449728878, -0.5184939977214171),
    "csr": (6.445449170376744, 1.0070290449728878, -0.5184939977214171),
    "ring": (-1.301025858225237, 1.5955076661581127, 0.8435582505651127),
    "diagonal": (-5.380846227759975, -3.3459423541723816, -0.2353332589644067),
    "groups": (-1.2937619614649696, -0.0579573172549499, 0.19882758593389452),
}
"""Projections of W, W_in and b of seed 1, which stored results and checkpoints rely on."""


@pytest.mark.parametrize("form", FORMS)
def test_a_seed_always_draws_the_same_reservoir(form: str) -> None:
    reservoir = Reservoir(
        30,
        2,
        rc_connectivity=0.3,
        input_connectivity=0.8,
        bias_scaling=0.2,
        seed=1,
        **FORMS[form],
    )
    assert reservoir.bias is not None
    drawn = (reservoir.dense_weight(), reservoir.input_weight, reservoir.bias)
    places = [torch.arange(x.numel(), dtype=torch.float64).cos() for x in drawn]
    found = [float(x.double().flatten() @ place) for x, place in zip(drawn, places, strict=True)]
    assert found == pytest.approx(SEED_ONE[form], rel=1e-5, abs=1e-6)


def test_a_sparse_matrix_is_never_made_dense() -> None:
    units = 100_000  # 40 GB as a dense matrix
    places = torch.randint(0, units, (2, 300_000), generator=torch.Generator().manual_seed(0))
    values = torch.full((300_000,), 0.1)
    w = torch.sparse_coo_tensor(places, values, (units, units), check_invariants=True)
    reservoir = Reservoir(W=w, input_dim=1)
    states, _ = reservoir(torch.ones(1, 3, 1))
    assert states.abs().max() > 0


def test_a_sparse_matrix_is_scaled_and_warned_of_as_a_dense_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = draw(120, 120) * (draw(120, 120, seed=1) > 1)
    options: dict[str, Any] = {"input_dim": 1, "activation": "relu", "lr": 0.5, "sr": 2.0}
    messages = []
    for given, most in ((w, 400), (w.to_sparse(), 400), (w.to_sparse(), 10)):
        monkeypatch.setattr(weights, "_DENSE_EIGENVALUES", most)
        with pytest.warns(UserWarning, match=r"lr W is [\d.]+: states may grow") as found:
            reservoir = Reservoir(W=given, **options)
        messages.append(str(found[0].message))
        torch.testing.assert_close(
            reservoir.dense_weight(), Reservoir(W=w, input_dim=1, sr=2.0).dense_weight()
        )
    assert len(set(messages)) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "units must be given"),
        ({"units": 3}, ValueError, "input_dim must be given"),
        ({"units": 3, "input_dim": 0}, ValueError, "input_dim must be at least 1 without feedback"),
        ({"units": 3, "input_dim": -1}, ValueError, "input_dim must be at least 0, got -1"),
        ({"units": 3, "input_dim": 1, "feedback_dim": -1}, ValueError, "feedback_dim must be at"),
        ({"W": SPARSE, "units": 10}, ValueError, "units is 10, but W has 12"),
        ({"W": SPARSE, "Win": WIN[:5]}, ValueError, "units of W is 12, but Win has 5"),
        ({"Win": WIN, "Wfb": WFB[1:]}, ValueError, "units of Win is 12, but Wfb has 11"),
        ({"Win": WIN, "bias": BIAS[:3]}, ValueError, "units of Win is 12, but bias has 3"),
        ({"Win": WIN, "input_dim": 3}, ValueError, "input_dim is 3, but Win has 2"),
        ({"Wfb": WFB, "input_dim": 1, "feedback_dim": 2}, ValueError, "feedback_dim is 2, but Wfb"),
        ({"W": SPARSE[:3]}, ValueError, r"W must be square, got shape \(3, 12\)"),
        ({"W": SPARSE[None, None]}, ValueError, r"W must be \(N, N\), \(groups, n, n\), or"),
        ({"W": torch.zeros(0, 0)}, ValueError, r"W must be \(N, N\)"),
        ({"Win": BIAS}, ValueError, r"Win must be \(units, input_dim\), got shape \(12,\)"),
        ({"bias": WIN}, ValueError, r"bias must be a number, \(units,\) or \(units, 1\)"),
        ({"W": "normal"}, TypeError, "W must be a tensor, an array or a sparse matrix, got 'norm"),
        ({"W": torch.randn}, TypeError, "W must be a tensor, an array or a sparse matrix"),
        ({"W": [[1.0], [1.0, 2.0]]}, TypeError, "W must be a tensor, an array or a sparse"),
        ({"W": np.array([["a"]])}, TypeError, "W must be a tensor, an array or a sparse"),
        (
            {"W": SPARSE.to(torch.complex64)},
            TypeError,
            "W must hold real numbers, got torch",
        ),
        ({"W": SPARSE.clone().requires_grad_()}, TypeError, "W gets no gradient.*detach it"),
        ({"W": SPARSE.to("meta")}, ValueError, "W must hold numbers"),
        ({"W": SPARSE * torch.nan}, ValueError, "W is not finite"),
        ({"Wfb": WFB.to_sparse() * torch.inf}, ValueError, "Wfb is not finite"),
        ({"W": SPARSE, "topology": "ring"}, ValueError, "topology is 'ring', but W has 'random'"),
        ({"W": BIAS, "groups": 2}, ValueError, "groups is 2, but W has 1"),
        ({"W": draw(3, 4, 4), "layout": "csr"}, ValueError, "layout 'csr' is for topology"),
        ({"W": RingWeight(BIAS, torch.zeros(12).long())}, ValueError, "W.source must be a perm"),
        ({"W": torch.zeros(3, 3), "sr": 0.5}, ValueError, "W has spectral radius 0"),
        ({"W": SPARSE, "bias": 1.0, "bias_scaling": 0.1}, ValueError, "bias_scaling must be 0"),
        ({"W": SPARSE, "dtype": torch.int32}, TypeError, "dtype must be a floating-point dtype"),
        ({"W": SPARSE, "fb_connectivity": 0.0}, ValueError, r"fb_connectivity must lie in \(0, 1"),
        ({"W": SPARSE, "feedback_dim": 2, "fb_scaling": (1, 2, 3)}, ValueError, "fb_scaling must"),
    ],
)
def test_bad_weights_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    sized = {"input_dim": 2} if {"W", "bias"} & set(options) and "Win" not in options else {}
    with pytest.raises(error, match=message):
        Reservoir(**(sized | options))


def test_it_is_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        empty = Reservoir(W=SPARSE.numpy(), Win=WIN.numpy(), Wfb=WFB.tolist(), bias=0.5)
    assert all(x.is_meta for x in empty.buffers())
    full = Reservoir(W=SPARSE, Win=WIN, Wfb=WFB, bias=0.5)
    empty.load_state_dict(full.state_dict(), assign=True)
    y = draw(1, 4, 3).float()
    assert torch.equal(empty(y[..., :2], teacher=y)[0], full(y[..., :2], teacher=y)[0])


def test_states_are_those_of_reservoirpy() -> None:
    nodes = pytest.importorskip("reservoirpy.nodes")
    joined = torch.cat((WIN, WFB), 1).numpy()
    node = nodes.Reservoir(W=SPARSE.numpy(), Win=joined, bias=BIAS.numpy(), lr=0.3)
    u, y = draw(1, 40, 2), draw(1, 40, 3, seed=1)
    before = torch.cat((torch.zeros_like(y[:, :1]), y[:, :-1]), 1)
    expected = torch.from_numpy(node.run(torch.cat((u, before), -1)[0].numpy()))
    reservoir = Reservoir(W=SPARSE, Win=WIN, Wfb=WFB, bias=BIAS, lr=0.3, dtype=torch.float64)
    torch.testing.assert_close(reservoir(u, teacher=y)[0][0], expected)
