"""Calls that are replayed: the same bits, for every op, from a function without the launcher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from resformer_kernels._core.op import OPS, TRITON
from resformer_kernels._triton import tape
from resformer_kernels._triton.available import interpreted
from resformer_kernels._triton.launch import assumed_capability, recorded_launches
from resformer_kernels.testing.poison import environment
from tests.op_calls import OpCall, op_calls

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

CALLS = op_calls()
WAITING = ("mix_value_embedding_backward_sparse",)
"""Ops whose results have a size that the data decides."""


@pytest.fixture
def replaying() -> Iterator[None]:
    with tape.everywhere():
        yield


def _bits(given: OpCall) -> list[Tensor]:
    """What a call returns, and what it leaves in its arguments."""
    arguments = given.again()
    results = getattr(getattr(torch.ops, TRITON), given.op.name).default(*arguments)
    return [x for x in tree_leaves((results, arguments)) if isinstance(x, Tensor)]


def _same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b)))


@pytest.mark.usefixtures("replaying")
@pytest.mark.parametrize("given", CALLS, ids=lambda given: given.name)
def test_a_replay_gives_the_bits_of_the_call(given: OpCall) -> None:
    first = _bits(given)
    launcher = tape.LAUNCHERS[given.op.name]
    assert launcher.recorded == 0
    for _ in range(3):
        _same(_bits(given), first)
    waits = given.op.name in WAITING
    assert launcher.recorded == (not waits)
    assert [problem.endswith("waits for the device") for problem in launcher.problems] == (
        [True] * waits
    )


def test_every_launcher_is_called() -> None:
    launched = {name for name, op in OPS.items() if op.triton is not None}
    assert {given.op.name for given in CALLS} == launched


def _times_run(launcher: tape.Replayed, ran: list[Any], *arguments: Any) -> int:
    """How often the launcher itself ran for three calls."""
    before = len(ran)
    for _ in range(3):
        launcher((*arguments,))
    return len(ran) - before


@pytest.mark.usefixtures("replaying")
def test_all_that_a_launcher_decides_by_is_recorded_on_its_own() -> None:
    ran: list[Any] = []

    def run(x: Tensor, y: Any, *_more: object) -> Tensor:
        ran.append(y)
        return x + (y if isinstance(y, Tensor) else 1)

    launcher = tape.Replayed("probe", run)
    x = torch.zeros(64)
    for arguments in (
        (x, 1.0),
        (x[:32], 1.0),
        (x[:32].view(2, 16), 1.0),
        (x[::2], 1.0),
        (x[1:33], 1.0),
        (x.double(), 1.0),
        (x, 0.0),
        (x, -0.0),
        (x, None),
        (x, "text"),
        (x, [x.clone()]),
        (x, x.clone()),
        (x, x),
    ):
        assert _times_run(launcher, ran, *arguments) == 2, arguments
        assert _times_run(launcher, ran, *arguments) == 0, arguments
    for variable in tape.SWITCHES:
        with environment(variable, "1"):
            assert _times_run(launcher, ran, x, 1.0) == 2
    for gpu in (((8, 0),), ((8, 0), 3), ((8, 0), 4)):
        with assumed_capability(*gpu):
            assert _times_run(launcher, ran, x, 1.0) == 2
    assert _times_run(launcher, ran, x, 1.0) == 0
    with recorded_launches():
        assert _times_run(launcher, ran, x, 1.0) == 3
    tape.forget()
    assert _times_run(launcher, ran, x, 1.0) == 2
    tape.LAUNCHERS.pop("probe")


@pytest.mark.usefixtures("replaying")
def test_what_reads_a_tensor_or_leaves_the_device_runs_each_time() -> None:
    def unknown(x: Tensor) -> Tensor:
        return x + kept

    kept = torch.ones(3)
    for run, reason in (
        (lambda x: x.new_full((int(x.sum().item()),), 1.0), "waits for the device"),
        (lambda x: x[x > 0], "waits for the device"),
        (lambda x: x.to("meta"), "leaves the device"),
        (unknown, "no argument and no op gave"),
    ):
        launcher = tape.Replayed("probe", run)
        for _ in range(4):
            launcher((torch.ones(3),))
        assert launcher.recorded == 0
        assert all(reason in problem for problem in launcher.problems)
        assert len(launcher.problems) == 1
    tape.LAUNCHERS.pop("probe")


def test_a_cpu_replays_nothing_by_itself() -> None:
    launcher = tape.Replayed("probe", lambda x: x + 1)
    for _ in range(4):
        launcher((torch.ones(3),))
    assert launcher.recorded == 0
    tape.LAUNCHERS.pop("probe")
