"""Behaviour of the Triton kernel, in Triton's interpreter: bits, sweeps, NaN."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from resformer_kernels import explain, reservoir_scan
from resformer_kernels.reservoir import segments
from resformer_kernels.testing import poisoned
from tests.reservoir.cases import empty, in_interpreter
from tests.reservoir.checks import (
    BY_KERNELS,
    check_compiles_whole,
    check_gradients,
    check_not_finite,
    check_op,
)
from tests.reservoir.together import together

pytest.importorskip("triton")
pytestmark = in_interpreter


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both_modes(u: Tensor, weight: Any, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """(step after step, in chunks, the chunks' info)."""
    expected, last = reservoir_scan(u, weight, mode="sequential", backend="triton", **options)
    with poisoned():
        got, end, info = reservoir_scan(
            u, weight, mode="chunked", backend="triton", return_info=True, **options
        )
    torch.testing.assert_close(end, last, rtol=0, atol=1e-5)
    return expected, got, info


def test_a_tolerance_of_zero_gives_the_same_bits() -> None:
    options: dict[str, Any] = {"input_weight": draw(36, 1, seed=1), "leak": 0.6, "tolerance": 0.0}
    expected, got, info = both_modes(draw(1, 180, 1), draw(36, 36) / 9, **options)
    assert torch.equal(got, expected)
    assert info.chunks == 12
    assert info.sweeps >= 2
    assert 1 < info.work < 6
    assert info.mismatch == 0


def test_most_work_is_done_once() -> None:
    u, weight = draw(1, 480, 16), draw(16, 16) / 12
    expected, _ = reservoir_scan(u, weight, backend="reference")
    got, _, info = reservoir_scan(u, weight, mode="chunked", backend="triton", return_info=True)
    assert float((got - expected).abs().max()) <= 1e-5
    assert info.forgot
    assert info.work < 1.6


def test_what_is_not_forgotten_is_run_in_order() -> None:
    turn = torch.linalg.qr(draw(17, 17)).Q.contiguous()
    options: dict[str, Any] = {"activation": "identity", "initial_state": draw(2, 17, seed=2)}
    expected, got, info = both_modes(draw(2, 64, 17) / 50, turn, **options)
    assert torch.equal(got, expected)
    assert not info.forgot
    assert info.mismatch == 0
    assert info.sweeps <= info.chunks


def test_where_differences_grow_again_the_bits_are_the_same() -> None:
    """The input drives at first and then falls silent: trajectories that met come apart again."""
    u = draw(1, 240, 1) * (torch.arange(240) % 20 < 12)[None, :, None] * 2
    options: dict[str, Any] = {"input_weight": draw(24, 1, seed=1)}
    expected, got, info = both_modes(u, draw(24, 24) * 1.6 / 24**0.5, **options)
    assert torch.equal(got, expected)
    assert not info.forgot
    assert info.mismatch == 0


def test_a_row_is_the_same_among_any_others() -> None:
    """Tiles of one row, and of sixteen."""
    u, weight = draw(19, 5, 150), draw(150, 150) / 15
    together, _ = reservoir_scan(u, weight, backend="triton")
    alone, _ = reservoir_scan(u[7:8], weight, backend="triton")
    assert torch.equal(together[7:8], alone)


@pytest.mark.parametrize("mode", ["sequential", "chunked"])
@pytest.mark.parametrize("activation", BY_KERNELS)
def test_what_is_not_finite_spreads_as_in_the_reference(activation: str, mode: str) -> None:
    u, weight = draw(2, 40, 12), draw(12, 12) / 5
    u[0, 25, 3], u[1, 30, 0] = torch.nan, torch.inf
    check_not_finite(u, weight, "triton", activation=activation, mode=mode)


@pytest.mark.parametrize("reduce", ["last", "mean", "gram"])
@pytest.mark.parametrize("packed", [False, True])
def test_reductions(reduce: str, packed: bool) -> None:
    u, weight, y = draw(2, 11, 6), draw(6, 6) / 5, draw(2, 11, 2, seed=1)
    options: dict[str, Any] = {"reduce": reduce, "targets": y if reduce == "gram" else None}
    if packed:
        u = u.flatten(0, 1)
        options["cu_seqlens"] = torch.tensor([0, 3, 3, 20], dtype=torch.int32)
        if reduce == "gram":
            options["targets"] = y.flatten(0, 1)
    with mock.patch.object(segments, "segment_length", return_value=5):
        got, last = reservoir_scan(u, weight, backend="triton", **options)
    expected, end = reservoir_scan(u, weight, backend="reference", **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end)


def test_packed_steps_that_belong_to_nobody_are_not_read() -> None:
    u, weight = draw(30, 9), draw(9, 9) / 6
    u[21:] = torch.nan
    offsets = torch.tensor([0, 4, 4, 21], dtype=torch.int32)
    start = draw(3, 9, seed=5)
    options: dict[str, Any] = {"cu_seqlens": offsets, "initial_state": start}
    expected, got, info = both_modes(u, weight, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(got[21:], torch.zeros(9, 9))
    assert info.chunks == 3


@empty
def test_empty(batch: int, steps: int, lengths: tuple[int, ...] | None) -> None:
    offsets = None
    u = draw(batch, steps, 4)
    if lengths is not None:
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        u = draw(sum(lengths), 4)
    weight = draw(4, 4)
    for mode in ("sequential", "chunked"):
        options: dict[str, Any] = {"cu_seqlens": offsets, "mode": mode, "return_info": True}
        got = reservoir_scan(u, weight, backend="triton", **options)
        expected = reservoir_scan(u, weight, backend="reference", **options)
        torch.testing.assert_close(got[:2], expected[:2])
        assert got[2].forgot


def test_gradients_in_chunks() -> None:
    leaves = [draw(1, 150, 1), draw(20, 20) / 7, draw(20, 1, seed=1)]
    check_gradients(leaves, 0.7, "chunked", "triton")


def test_opcheck() -> None:
    leak, none = torch.tensor(0.5), None
    given = (draw(2, 3, 4), draw(4, 4), none, none, none, leak, none, none, 0, 0, 1e-6, none)
    check_op("resformer_triton", given, None)


def test_compiles_whole() -> None:
    check_compiles_whole("triton")


def test_explains_itself() -> None:
    u, weight = draw(1, 4, 6), draw(6, 6)
    assert explain(reservoir_scan, u, weight, backend="triton").backend == "triton"
    found = explain(reservoir_scan, u.double(), weight.double())
    assert "its state is float32" in found.reasons["triton"]
    with mock.patch.dict("os.environ", {"TRITON_INTERPRET": "0"}):
        found = explain(reservoir_scan, u, weight)
    assert "it runs on CUDA tensors" in found.reasons["triton"]


@pytest.mark.parametrize("mode", ["sequential", "chunked"])
def test_programs_that_meet_give_the_bits_of_one(mode: str) -> None:
    """Forward and backward; more tiles than programs where there are many chunks."""
    u, weight, w_in = draw(9, 34, 1), draw(35, 35) / 9, draw(35, 1, seed=1)
    u = u[:, :6] if mode == "sequential" else u
    found = []
    for programs in (1, 3):
        x = [leaf.clone().requires_grad_() for leaf in (u, weight)]
        with together(programs) as launched:
            states, last, info = reservoir_scan(
                x[0],
                x[1],
                input_weight=w_in,
                leak=0.8,
                mode=mode,
                backend="triton",
                return_info=True,
            )
            gradients = torch.autograd.grad(states.square().sum() + last.sum(), x)
        assert (max(launched) > 1) == (programs > 1)
        found.append([states, last, *info, *gradients])
    assert (found[0][2] > 16) == (mode == "chunked")
    for one, several in zip(*found, strict=True):
        assert torch.equal(one, several)
