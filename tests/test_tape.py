"""Calls that are replayed: the same bits, for every op, from a function without the launcher."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from resformer_kernels._core.op import OPS, TRITON
from resformer_kernels._triton import tape
from resformer_kernels._triton.available import interpreted
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
    launched = {name for name, op in OPS.items() if op.composed is None}
    assert {given.op.name for given in CALLS} == launched
