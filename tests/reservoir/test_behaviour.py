"""Behaviour of a call: modes that agree, streams, reductions, packed sequences, NaN, reasons."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from resformer_kernels import RingWeight, explain, reservoir_scan
from resformer_kernels.reservoir import segments
from resformer_kernels.reservoir.reduction import sums_in_pieces
from resformer_kernels.testing import poisoned
from tests.reservoir.checks import BY_KERNELS, check_gradients, check_not_finite

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")


def reservoir(units: int, radius: float, seed: int = 0) -> Tensor:
    weight = torch.randn(units, units, generator=torch.Generator().manual_seed(seed))
    return weight * radius / units**0.5


def signal(steps: int, scale: float = 1.0, batch: int = 1) -> Tensor:
    return torch.randn(batch, steps, 1, generator=torch.Generator().manual_seed(3)) * scale


def projection(units: int) -> Tensor:
    return torch.rand(units, 1, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.mark.parametrize("radius", [0.5, 0.9, 1.25])
@pytest.mark.parametrize("leak", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_chunked_equals_sequential(radius: float, leak: float, scale: float, native: str) -> None:
    u, weight, w_in = signal(3000, scale), reservoir(96, radius), projection(96)
    expected, last = reservoir_scan(
        u, weight, input_weight=w_in, leak=leak, mode="sequential", backend=native
    )
    with poisoned():
        got, end, info = reservoir_scan(
            u, weight, input_weight=w_in, leak=leak, mode="chunked", return_info=True
        )
    assert float((got - expected).abs().max()) <= 1e-5
    assert float((end - last).abs().max()) <= 1e-5
    assert info.chunks == 12
    assert info.sweeps >= 2
    assert info.work >= 1
    if radius < 1 and leak == 1:
        assert info.forgot
        assert info.work < 4


@pytest.mark.parametrize("kind", ["orthogonal", "chaotic"])
def test_what_is_not_forgotten_is_run_in_order(kind: str, native: str) -> None:
    u = signal(1200, 0.02)
    if kind == "orthogonal":
        weight = torch.linalg.qr(reservoir(64, 1.0)).Q.contiguous()
        activation = "identity"
    else:
        weight, activation = reservoir(64, 4.0), "tanh"
    options: dict[str, Any] = {"input_weight": projection(64), "activation": activation}
    expected, _ = reservoir_scan(u, weight, mode="sequential", backend=native, **options)
    got, _, info = reservoir_scan(u, weight, mode="chunked", return_info=True, **options)
    assert torch.equal(got, expected)
    assert not info.forgot
    assert info.mismatch == 0
    assert info.work < 4


@pytest.mark.parametrize(("radius", "seed"), [(1.25, 8), (1.1, 14)])
def test_where_differences_grow_again_the_bits_are_the_same(radius: float, seed: int) -> None:
    """Both forget, but not all the time: rounding alone grows to 1e-5 in float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(256, 256, generator=generator) * radius / 16
    w_in = torch.rand(256, 1, generator=generator) * 2 - 1
    u = torch.randn(1, 8192, 1, generator=generator) * 0.3
    options: dict[str, Any] = {"input_weight": w_in, "leak": 0.5}
    expected, _ = reservoir_scan(u, weight, mode="sequential", **options)
    with poisoned():
        got, _, info = reservoir_scan(u, weight, mode="chunked", return_info=True, **options)
    assert torch.equal(got, expected)
    assert not info.forgot
    assert info.mismatch == 0
    assert info.work < 4


def test_a_tolerance_of_zero_gives_the_same_bits(native: str) -> None:
    u, weight, w_in = signal(900), reservoir(40, 0.8), projection(40)
    options: dict[str, Any] = {"input_weight": w_in, "leak": 0.5, "backend": native}
    expected, _ = reservoir_scan(u, weight, mode="sequential", **options)
    got, _ = reservoir_scan(u, weight, mode="chunked", tolerance=0.0, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["sequential", "chunked"])
def test_gradients_of_either_mode(mode: str, native: str) -> None:
    leaves = [signal(800, batch=2), reservoir(48, 0.9), projection(48)]
    check_gradients(leaves, 0.5, mode, native)


@pytest.mark.parametrize("mode", ["sequential", "chunked"])
def test_a_stream_cut_anywhere_is_one_call(mode: str, native: str) -> None:
    u, weight, w_in = signal(1500, batch=2), reservoir(70, 0.9), projection(70)
    options: dict[str, Any] = {"input_weight": w_in, "leak": 0.3, "mode": mode, "backend": native}
    expected, last = reservoir_scan(u, weight, **options)
    state: Any = None
    pieces = []
    bounds = [0, 1, 2, 130, 131, 700, 1499, 1500]
    for begin, end in itertools.pairwise(bounds):
        states, state = reservoir_scan(u[:, begin:end], weight, initial_state=state, **options)
        pieces.append(states)
    got = torch.cat(pieces, dim=1)
    if mode == "sequential":
        assert torch.equal(got, expected)
        assert torch.equal(state, last)
    assert float((got - expected).abs().max()) <= 1e-5


def test_packed_is_each_sequence_by_itself(backend: str) -> None:
    lengths = [5, 0, 17, 1, 40]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    u, weight = torch.randn(sum(lengths) + 4, 12), reservoir(12, 0.9)
    u[sum(lengths) :] = torch.nan
    start = torch.randn(len(lengths), 12)
    options: dict[str, Any] = {"leak": 0.5, "backend": backend}
    states, last = reservoir_scan(u, weight, initial_state=start, cu_seqlens=offsets, **options)
    assert torch.equal(states[sum(lengths) :], torch.zeros(4, 12))
    for i in range(len(lengths)):
        piece = u[None, offsets[i] : offsets[i + 1]]
        one, end = reservoir_scan(piece, weight, initial_state=start[i : i + 1], **options)
        torch.testing.assert_close(states[offsets[i] : offsets[i + 1]], one[0])
        torch.testing.assert_close(last[i], end[0])


@pytest.mark.parametrize("lengths", [(5, 0, 17, 1, 40), (300, 129, 0, 64), (0, 0), (7,) * 60])
def test_sums_in_pieces_are_those_of_each_sequence(lengths: tuple[int, ...]) -> None:
    """The sums of a GPU, in a fixed order."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    states = torch.randn(sum(lengths) + 3, 11, dtype=torch.float64)
    states[sum(lengths) :] = torch.nan
    leaf = states.clone().requires_grad_()
    found = sums_in_pieces(leaf, offsets)
    expected = torch.stack([x.sum(0) for x in states[: sum(lengths)].split(list(lengths))])
    torch.testing.assert_close(found.detach(), expected)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    belongs = (torch.arange(len(states)) < sum(lengths)).double()
    assert torch.equal(gradient, belongs[:, None].expand_as(gradient))


@pytest.mark.parametrize("reduce", ["last", "mean", "gram"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_reductions(
    reduce: str, packed: bool, wanted: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "segment_length", lambda *_: 8)
    weight = reservoir(10, 0.9)
    offsets: Tensor | None = None
    if packed:
        offsets = torch.tensor([0, 3, 3, 30, 38], dtype=torch.int32)
        u, y = torch.randn(41, 10), torch.randn(41, 2)
        y[38:] = u[38:] = torch.nan
    else:
        u, y = torch.randn(3, 21, 10), torch.randn(3, 21, 2)
    weight.requires_grad_(wanted)
    options: dict[str, Any] = {"leak": 0.5, "cu_seqlens": offsets, "backend": backend}
    states, last = reservoir_scan(u, weight, **options)
    if offsets is not None:
        rows = [states[offsets[i] : offsets[i + 1]] for i in range(4)]
        y = y[:38]
    else:
        rows = list(states)
    targets: Tensor | None = None
    if reduce == "last":
        expected = [last]
    elif reduce == "mean":
        expected = [torch.stack([x.mean(0) if len(x) else torch.zeros(10) for x in rows])]
    else:
        steps = torch.cat(rows).double()
        targets = torch.cat([y, torch.full((3, 2), torch.nan)]) if packed else y
        expected = [steps.T @ steps, steps.T @ y.flatten(0, -2).double()]
    with poisoned():
        got, end, info = reservoir_scan(
            u, weight, reduce=reduce, targets=targets, return_info=True, **options
        )
    found = got if reduce == "gram" else [got]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
        assert not wanted or a.requires_grad
    torch.testing.assert_close(end, last)
    assert info.forgot


def test_gram_without_targets_and_without_steps(backend: str) -> None:
    weight = reservoir(6, 0.5)
    (gram, cross), last = reservoir_scan(
        torch.randn(2, 0, 6), weight, reduce="gram", backend=backend
    )
    assert torch.equal(gram, torch.zeros(6, 6, dtype=torch.float64))
    assert cross.shape == (6, 0)
    assert torch.equal(last, torch.zeros(2, 6))
    mean, _ = reservoir_scan(torch.randn(2, 0, 6), weight, reduce="mean", backend=backend)
    assert torch.equal(mean, torch.zeros(2, 6))


@pytest.mark.parametrize("mode", ["sequential", "chunked"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", BY_KERNELS)
def test_what_is_not_finite_spreads_as_in_the_reference(
    bad: float, activation: str, mode: str, native: str
) -> None:
    u, weight = torch.randn(2, 200, 20), reservoir(20, 0.5)
    u[0, 120, 3] = bad
    check_not_finite(u, weight, native, activation=activation, mode=mode)


@pytest.mark.usefixtures("cpu_path")
def test_extreme_magnitudes() -> None:
    u = torch.tensor([0.0, 1e-30, -1e-8, 1e-3, 20.0, -100.0, 1e30, -3e38, 9.1]).repeat(1, 9, 1)
    states, _ = reservoir_scan(u, torch.zeros(9, 9), backend="native")
    torch.testing.assert_close(states, torch.tanh(u), rtol=3e-7, atol=0)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("activation", ["sigmoid", "softplus"])
def test_exponentials_of_every_magnitude(activation: str) -> None:
    u = torch.cat((torch.linspace(-87, 87, 3000), torch.tensor([0.0, 1e-30, -1e-8, 3e38])))
    states, _ = reservoir_scan(
        u.view(1, 1, -1), torch.zeros(u.numel()), activation=activation, backend="native"
    )
    exact = {"sigmoid": torch.sigmoid, "softplus": lambda z: -logsigmoid(-z)}[activation]
    torch.testing.assert_close(states.double().flatten(), exact(u.double()), rtol=3e-7, atol=0)
    far, _ = reservoir_scan(
        torch.full((1, 1, 9), -3e38), torch.zeros(9), activation=activation, backend="native"
    )
    assert far.abs().max() < 1e-37


def test_softmax_is_the_references(native: str) -> None:
    u, weight = torch.randn(1, 4, 6), torch.randn(6, 6)
    found = explain(reservoir_scan, u, weight, activation="softmax")
    assert found.backend == "reference"
    assert all("softmax couples the units" in found.reasons[name] for name in (native, "triton"))
    with pytest.raises(RuntimeError, match="softmax couples the units"):
        reservoir_scan(u, weight, activation="softmax", backend=native)
    states, _ = reservoir_scan(u, weight, activation="softmax")
    torch.testing.assert_close(states.sum(-1), torch.ones(1, 4))


def test_explains_itself(native: str) -> None:
    u, weight = torch.randn(1, 4, 6), torch.randn(6, 6)
    assert explain(reservoir_scan, u, weight).backend == native
    found = explain(reservoir_scan, u.double(), weight.double())
    assert found.backend == "reference"
    assert "float32" in found.reasons["native"]
    found = explain(reservoir_scan, torch.randn(1, 6, 4).mT, weight)
    assert "inputs is copied once" in found.notes[0]
    found = explain(reservoir_scan, u.to("meta"), weight.to("meta"))
    assert "CPU and CUDA tensors" in found.reasons["native"]


def test_a_ring_keeps_what_it_is_given() -> None:
    states, _ = reservoir_scan(
        torch.eye(5)[None], RingWeight(torch.ones(5)), activation="identity", backend="reference"
    )
    # Each entry moves by one unit per step.
    assert torch.equal(states[0, -1], torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0]))
