"""Series of any lengths streamed into readouts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resformer_kernels.nn import RLS, Ridge
from resformer_kernels.nn.state import KeepsTensors
from resformer_kernels.reservoir import segments
from tests.nn.loops import FORMS, draw, forced, make

LENGTHS, WASHOUTS = (9, 1, 30, 0, 14), (3, 1, 0, 0, 14)
Readout = Ridge | RLS

every_form = pytest.mark.parametrize("form", FORMS)
every_size = pytest.mark.parametrize("pieces", [4, 12, 10**6])


def series(inputs: int = 2) -> tuple[list[Tensor] | None, list[Tensor]]:
    us = [draw(n, inputs, seed=n) for n in LENGTHS] if inputs else None
    return us, [draw(n, 3, seed=n + 50) for n in LENGTHS]


def in_pieces(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """States exist for `pieces` steps at a time."""
    monkeypatch.setattr(segments, "_SHORTEST", pieces)
    monkeypatch.setattr(segments, "_ELEMENTS", 1)


def fitted(kind: str, states: Tensor, targets: Tensor) -> Readout:
    if kind == "Ridge":
        return Ridge(30, 3, 1e-2).fit(states, targets)
    return RLS(30, 3, alpha=1e-2, forgetting=0.98).update(states, targets)


def streamed(kind: str) -> Readout:
    if kind == "Ridge":
        return Ridge(30, 3, 1e-2)
    return RLS(30, 3, alpha=1e-2, forgetting=0.98)


def check_same(readout: Readout, expected: Readout) -> None:
    if isinstance(readout, Ridge):
        readout.solve()
    torch.testing.assert_close(readout.weight, expected.weight, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(readout.bias, expected.bias, atol=1e-7, rtol=1e-5)


@every_form
@every_size
@pytest.mark.parametrize("kind", ["Ridge", "RLS"])
@pytest.mark.parametrize("fed", [0, 3])
def test_a_list_is_its_series_one_after_another(
    form: str, pieces: int, kind: str, fed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces(monkeypatch, pieces)
    us, ys = series()
    assert us is not None
    reservoir = make(2, fed, **FORMS[form])
    states = [forced(reservoir, u[None], y[None])[0] for u, y in zip(us, ys, strict=True) if len(u)]
    kept = [(y, w) for y, w in zip(ys, WASHOUTS, strict=True) if len(y)]
    parts = [(h[w:], y[w:]) for h, (y, w) in zip(states, kept, strict=True)]
    expected = fitted(kind, torch.cat([h for h, _ in parts]), torch.cat([y for _, y in parts]))
    readout = streamed(kind)
    final = reservoir.stream(readout, us, ys, washout=WASHOUTS)
    check_same(readout, expected)
    assert final.shape == (5, 30)
    torch.testing.assert_close(final[[0, 1, 2, 4]], torch.stack([h[-1] for h in states]))
    assert not final[3].any()


@every_size
@pytest.mark.parametrize("kind", ["Ridge", "RLS"])
@pytest.mark.parametrize("inputs", [2, 0])
def test_a_batch_is_fitted_step_after_step(
    pieces: int, kind: str, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces(monkeypatch, pieces)
    reservoir = make(inputs)
    u, y = draw(2, 33, inputs) if inputs else None, draw(2, 33, 3, seed=1)
    states = forced(reservoir, u, y)
    rows = states[:, 5:], y[:, 5:]
    if kind == "RLS":  # the series side by side
        rows = rows[0].transpose(0, 1), rows[1].transpose(0, 1)
    expected = fitted(kind, *rows)
    readout = streamed(kind)
    final = reservoir.stream(readout, u, y, washout=5)
    check_same(readout, expected)
    torch.testing.assert_close(final, states[:, -1])


def test_a_batch_may_have_several_washouts() -> None:
    reservoir, u, y = make(), draw(3, 20, 2), draw(3, 20, 3, seed=1)
    found, expected = Ridge(30, 3), Ridge(30, 3)
    for washout in ((4, 0, 20), torch.tensor([4, 0, 20])):
        found.reset()
        final = reservoir.stream(found, u, y, washout=washout)
    for i, own in enumerate((4, 0, 20)):
        last = reservoir.stream(expected, u[i : i + 1], y[i : i + 1], washout=own)
        torch.testing.assert_close(final[i], last[0])
    torch.testing.assert_close(found.solve().weight, expected.solve().weight)
    assert found.count == expected.count == 36


@every_size
@pytest.mark.parametrize("kind", ["Ridge", "RLS"])
def test_stateful_streams_continue(pieces: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(monkeypatch, pieces)
    us, ys = series()
    assert us is not None
    reservoir = make(stateful=True)
    expected, found = Ridge(30, 3), Ridge(30, 3)
    whole = make().stream(expected, us, ys)
    for end in (False, True):
        parts = [slice(n // 2, n) if end else slice(0, n // 2) for n in LENGTHS]
        some = [[x[part] for x, part in zip(xs, parts, strict=True)] for xs in (us, ys)]
        final = reservoir.stream(found, *some)
    torch.testing.assert_close(final, whole)
    torch.testing.assert_close(found.solve().weight, expected.solve().weight)
    assert reservoir.state is not None
    assert reservoir.feedback is not None
    assert torch.equal(reservoir.state, final)
    wanted = torch.stack([y[-1] if len(y) else torch.zeros(3, dtype=y.dtype) for y in ys])
    assert torch.equal(reservoir.feedback, wanted)
    with pytest.raises(ValueError, match="inputs must hold 5 sequences"):
        reservoir.stream(streamed(kind), us[:2], ys[:2])
    reservoir.reset()
    batch = reservoir.stream(streamed(kind), draw(2, 9, 2), draw(2, 9, 3), washout=9)
    assert torch.equal(reservoir.state, batch)


def test_single_precision_streams_by_the_kernels() -> None:
    us, ys = series()
    assert us is not None
    expected, found = Ridge(30, 3, 1e-2), Ridge(30, 3, 1e-2)
    with pytest.raises(ValueError, match=r"washout must lie in \[0, 0\], got 1"):
        make().stream(expected, us, ys, washout=(0, 0, 0, 1, 0))
    reservoir = make(dtype=torch.float32)
    reservoir.stream(found, [u.float() for u in us], ys, washout=(1, 1, 1, 0, 1))
    make().stream(expected, us, ys, washout=(1, 1, 1, 0, 1))
    torch.testing.assert_close(found.solve().weight, expected.solve().weight, atol=1e-4, rtol=1e-3)
    # Targets of other dtypes are taken, and whole numbers.
    labels = [(y > 0).long() for y in ys]
    reservoir.stream(found, [u.bfloat16() for u in us], labels)
    make(2, 0).stream(RLS(30, 3), us, labels)


def contents(readout: KeepsTensors) -> list[Tensor]:
    return [x.clone() for x in (*readout.buffers(), *readout._kept.values())]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"targets": "nan"}, ValueError, r"targets\[2\] is not finite: nan at \(7, 1\)"),
    ({"inputs": "nan"}, ValueError, r"inputs\[2\] is not finite: nan at \(7, 1\)"),
    ({"washout": -1}, ValueError, r"washout must lie in \[0, 9\], got -1"),
    ({"washout": (0, 0, 31, 0, 0)}, ValueError, r"washout must lie in \[0, 30\], got 31"),
    ({"washout": (0, 0)}, ValueError, "must have as many series, got 5, 5 and 2"),
    ({"washout": 0.5}, TypeError, "washout must be an int"),
    ({"inputs": series()[0][:4]}, ValueError, "must have as many series, got 4, 5 and 1"),  # type: ignore[index]
    ({"inputs": draw(5, 9, 2)}, TypeError, "inputs and targets must be two tensors or two lists"),
    ({"inputs": None}, TypeError, r"inputs\[0\] must be a tensor \(time, 2\)"),
    ({"inputs": [[1.0]] * 5}, TypeError, r"inputs\[0\] must be a tensor \(time, 2\)"),
    ({"inputs": series(3)[0]}, ValueError, r"inputs\[0\] must be \(9, 2\)"),
    ({"targets": [y[:1] for y in series()[1]]}, ValueError, r"inputs\[0\] must be \(1, 2\)"),
    ({"targets": series(0)[1][0]}, TypeError, "two tensors or two lists"),
    ({"readout": nn.Linear(30, 3)}, TypeError, "readout must be a Ridge or an RLS"),
    ({"readout": Ridge(29, 3)}, ValueError, "readout must take 30 states"),
    ({"readout": Ridge(30, 2)}, ValueError, "readout must give the 3 fed back"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
@pytest.mark.parametrize("kind", ["Ridge", "RLS"])
def test_what_is_refused_changes_nothing(
    kind: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    us, ys = series()
    assert us is not None
    reservoir, readout = make(stateful=True), streamed(kind)
    reservoir.stream(readout, us, ys)
    given: dict[str, Any] = {"readout": readout, "inputs": us, "targets": ys} | options
    for name in ("inputs", "targets"):
        if options.get(name) == "nan":
            given[name] = copy.deepcopy(us if name == "inputs" else ys)
            given[name][2][7, 1] = torch.nan
    assert reservoir.state is not None
    before, state = contents(readout), reservoir.state.clone()
    with pytest.raises(error, match=message):
        reservoir.stream(**given)
    assert all(torch.equal(x, y) for x, y in zip(contents(readout), before, strict=True))
    assert torch.equal(reservoir.state, state)


@pytest.mark.parametrize("kind", ["Ridge", "RLS"])
def test_states_that_overflow_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(monkeypatch, 20)
    with pytest.warns(UserWarning, match="may grow"):
        reservoir = make(2, 0, activation="identity", sr=1e20, lr=1.0)
    readout = streamed(kind)
    make(2, 0).stream(readout, draw(2, 9, 2), draw(2, 9, 3))
    before = contents(readout)
    with pytest.raises(ValueError, match=r"is not finite|is too large"):
        reservoir.stream(readout, draw(2, 99, 2), draw(2, 99, 3))
    assert all(torch.equal(x, y) for x, y in zip(contents(readout), before, strict=True))


def test_targets_of_a_washout_are_not_read_unless_fed_back() -> None:
    u, y = draw(2, 20, 2), draw(2, 20, 3)
    holed = y.clone()
    holed[:, :5] = torch.nan
    found, expected = Ridge(30, 3), Ridge(30, 3)
    make(2, 0).stream(found, u, holed, washout=5)
    make(2, 0).stream(expected, u, y, washout=5)
    torch.testing.assert_close(found.solve().weight, expected.solve().weight)
    with pytest.raises(ValueError, match=r"targets is not finite: nan at \(0, 0, 0\)"):
        make().stream(found, u, holed, washout=5)
    with pytest.raises(ValueError, match=r"targets is not finite: nan at \(0, 4, 0\)"):
        make(2, 0).stream(found, u, holed, washout=4)


def test_no_series_are_no_data() -> None:
    readout = Ridge(30, 3)
    assert make().stream(readout, [], []).shape == (0, 30)
    with pytest.raises(RuntimeError, match="no data was seen yet"):
        readout.solve()
