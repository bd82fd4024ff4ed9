"""`linear_scan` on sequences that are split across ranks equals that on the whole."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.checkpoint import CheckpointError, checkpoint

from resformer_kernels import linear_scan, reservoir_scan
from resformer_kernels.distributed import context_parallel, traffic
from tests.distributed import ranks
from tests.interpreter import quick
from tests.scan.cases import Case, Inputs, in_float64, inputs_of, run

pytestmark = pytest.mark.usefixtures("native")

_F32, _BF16, _C64 = torch.float32, torch.bfloat16, torch.complex64
CASES = [
    Case(_F32, 5, length=37),
    Case(_F32, 5, length=37, reverse=True, initial=False),
    Case(_F32, 3, length=40, constant=True, seed=1),
    Case(_F32, 3, length=23, constant=True, reverse=True, kind="unit", seed=2),
    Case(_F32, 4, length=6, kind="switch", seed=3),
    Case(_F32, 4, batch=3, length=1, constant=True, seed=4),
    Case(_F32, 4, batch=1, length=2, reverse=True, seed=5),
    Case(_F32, 4, length=0, seed=6),
    Case(_F32, 4, batch=0, length=9, seed=7),
    Case(_F32, 2, length=31, outputs="final", layout="sliced", seed=8),
    Case(_F32, 2, length=31, outputs="states", layout="strided", grad_layout="expanded", seed=9),
    Case(_BF16, 6, length=33, wide_gates=True, seed=10),
    Case(torch.float16, 6, length=50, constant=True, seed=11),
    Case(_BF16, 6, length=29, reverse=True, outputs="states", seed=12),
    Case(_C64, 3, length=37, kind="unit", seed=13),
    Case(_C64, 3, length=22, reverse=True, seed=14),
    Case(_C64, 3, length=41, constant=True, seed=15),
    Case(_C64, 2, length=5, constant=True, reverse=True, layout="time_first", seed=16),
]


def _share(whole: Tensor) -> Tensor:
    """A part of what the ranks' parts sum to: a quarter on the first, the rest on the last."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    return whole * (0.25 * (rank == 0) + 0.75 * (rank == last))


def _one(case: Case, inputs: Inputs, balanced: bool, backend: str) -> list[Tensor]:
    """As `run` of the whole."""
    with context_parallel(dist.group.WORLD, length=case.length, balanced=balanced) as sequence:
        leaves = [sequence.shard(x, 1) if x.dim() == 3 else x for x in inputs.leaves]
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        outputs = linear_scan(*leaves, reverse=case.reverse, backend=backend)
        used = slice(case.outputs == "final", 1 if case.outputs == "states" else 2)
        given = (sequence.shard(inputs.grads[0], 1), _share(inputs.grads[1]))
        found = torch.autograd.grad(outputs[used], leaves, given[used])
        states = sequence.gather(outputs[0].detach(), 1)
        gradients = [
            sequence.gather(grad, 1) if grad.dim() == 3 else sequence.ranks.sum("test", grad)
            for grad in found
        ]
        return [states, outputs[1].detach(), *gradients]


def _on_a_rank(balanced: bool) -> list[list[Tensor]]:
    found = []
    for case in CASES:
        inputs = inputs_of(case)
        found.append(_one(case, inputs, balanced, "auto"))
        found.append(_one(case, in_float64(inputs), balanced, "reference"))
    return found


@functools.cache
def _of_one_process(case: Case) -> tuple[list[Tensor], ...]:
    """The reference's results in the case's precision, in float64, and of the moduli."""
    inputs = inputs_of(case)
    every = (inputs, in_float64(inputs), in_float64(inputs, sizes=True))
    return tuple(run(case, x, "reference") for x in every)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_states_and_gradients_are_those_of_one_process(world: int, balanced: bool) -> None:
    found = ranks.run(world, _on_a_rank, balanced)
    for number, case in enumerate(CASES):
        near, exact, terms = _of_one_process(case)
        unit = torch.finfo(case.dtype).eps / 2
        for rank in found:
            for i, true in enumerate(exact):
                got, wide = rank[2 * number][i], rank[2 * number + 1][i]
                assert got.shape == near[i].shape
                assert got.dtype is near[i].dtype
                assert torch.equal(wide, found[0][2 * number + 1][i])
                sums = float(terms[i].norm())
                assert float((wide - true).norm()) <= 1e-14 * sums, (case, i)
                budget = 2 * float((near[i].to(true.dtype) - true).norm()) + 2 * unit * sums
                assert float((got.to(true.dtype) - true).norm()) <= budget, (case, i)


def _moved(constant: bool) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    length, channels, batch = 64, 8, 3
    form = (channels,) if constant else (batch, length, channels)
    gates, tokens = torch.rand(form), torch.randn(batch, length, channels)
    with context_parallel(dist.group.WORLD, length=length) as sequence:
        leaves = [gates if constant else sequence.shard(gates, 1), sequence.shard(tokens, 1)]
        leaves = [x.requires_grad_() for x in leaves]
        with traffic() as forward:
            states, _ = linear_scan(*leaves)
        with traffic() as backward:
            states.sum().backward()
    return dict(forward.calls), dict(forward.sent), dict(backward.sent)


@pytest.mark.parametrize("constant", [True, False])
def test_carries_move_once_in_each_direction(constant: bool) -> None:
    state = 2 * 3 * 8 * 4  # bytes that a rank sends to each of two: a state for every sequence
    for calls, forward, backward in ranks.run(3, _moved, constant):
        assert calls == {"carries": 1}
        assert forward == {"carries": (2 if constant else 4) * state}
        assert backward == {"adjoints": 3 * state}


def _at_the_edges() -> dict[str, Any]:
    found: dict[str, Any] = {}
    tokens = torch.randn(1, 64, 2)
    with context_parallel(dist.group.WORLD, length=64) as sequence:
        mine = sequence.shard(tokens, 1)
        # The product of a piece's gates overflows, the states are zeros until late.
        late = torch.zeros(1, 64, 2)
        late[:, 60:] = 1
        found["overflow"] = sequence.gather(
            linear_scan(torch.full((2,), 1e4), sequence.shard(late, 1))[0], 1
        )
        by_step = torch.full((1, 64, 2), 1e4)
        found["overflow by step"] = sequence.gather(
            linear_scan(sequence.shard(by_step, 1), sequence.shard(late, 1))[0], 1
        )
        mine.requires_grad_()
        fixed = linear_scan(torch.full((2,), 0.5), mine)[0]
        found["tokens alone"] = sequence.gather(torch.autograd.grad(fixed.sum(), mine)[0], 1)
        errors = {
            "packed": lambda: linear_scan(
                torch.ones(2), mine[0], cu_seqlens=torch.tensor([0, len(mine[0])]).int()
            ),
            "length": lambda: linear_scan(torch.ones(2), mine[:, :-1]),
            "backend": lambda: linear_scan(torch.ones(2), mine.double(), backend="native"),
        }
        for name, call in errors.items():
            try:
                call()
            except (RuntimeError, ValueError) as error:
                found[name] = f"{type(error).__name__}: {error}"
        gates = torch.full((2,), 0.5, requires_grad=True)
        (grad,) = torch.autograd.grad(linear_scan(gates, mine)[0].sum(), mine, create_graph=True)
        try:
            torch.autograd.grad(grad.sum(), gates)
        except RuntimeError as error:
            found["double"] = str(error)
    return found


def test_edges_and_errors() -> None:
    late = torch.zeros(1, 64, 2)
    late[:, 60:] = 1
    mine = torch.randn(1, 64, 2, requires_grad=True)
    fixed = linear_scan(torch.full((2,), 0.5), mine)[0]
    (tokens_alone,) = torch.autograd.grad(fixed.sum(), mine)
    for found in ranks.run(2, _at_the_edges):
        for name in ("overflow", "overflow by step"):
            torch.testing.assert_close(found[name], linear_scan(torch.full((2,), 1e4), late)[0])
        torch.testing.assert_close(found["tokens alone"], tokens_alone)
        assert found["packed"].startswith("RuntimeError: linear_scan with cu_seqlens cannot run")
        assert found["length"].startswith("ValueError: tokens must hold this rank's 32 of 64")
        assert found["backend"].startswith("RuntimeError: linear_scan: backend='native' cannot")
        assert "linear_scan does not support double backward" in found["double"]


def _by_triton() -> list[list[Tensor]]:
    with quick():
        return [_one(case, inputs_of(case), True, "triton") for case in TRITON]


TRITON = [
    Case(_C64, 2, length=7, seed=20),
    Case(_F32, 2, batch=1, length=5, constant=True, reverse=True, seed=21),
]


@pytest.mark.usefixtures("interpreter")
def test_triton_kernels_carry_too() -> None:
    for rank in ranks.run(2, _by_triton):
        for case, found in zip(TRITON, rank, strict=True):
            for got, true in zip(found, _of_one_process(case)[1], strict=True):
                assert float((got.to(true.dtype) - true).norm()) <= 1e-6 * float(true.norm())


def _functions() -> dict[str, Any]:
    """A chain of both scans, as it is, compiled whole, and checkpointed."""

    def chain(gates: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
        states, last = linear_scan(gates, tokens)
        found, final = reservoir_scan(states.tanh(), weight, leak=0.4)
        return found.square().sum() + final.sum() + last.sum()

    return {
        "plain": chain,
        "compiled": torch.compile(chain, fullgraph=True, backend="aot_eager"),
        "checkpointed": lambda *x: checkpoint(chain, *x, use_reentrant=False),
    }


def _chained() -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    gates, tokens = (torch.rand(2, 40, 4, generator=generator) for _ in range(2))
    weight = torch.randn(4, 4, generator=generator) / 4
    found = {}
    with context_parallel(dist.group.WORLD, length=40) as sequence:
        given = [sequence.shard(gates, 1), sequence.shard(tokens, 1), weight]
        for name, function in _functions().items():
            leaves = [x.clone().requires_grad_() for x in given]
            result = function(*leaves)
            found[name] = [result.detach(), *torch.autograd.grad(result, leaves)]
            with torch.no_grad():
                assert torch.equal(function(*leaves), result)
    leaves = [x.clone().requires_grad_() for x in given]
    with context_parallel(dist.group.WORLD, length=40):
        late = checkpoint(linear_scan, *leaves[:2], use_reentrant=False)[0].sum()
    with pytest.raises(CheckpointError):
        late.backward()
    return found


def test_in_compiled_graphs_and_under_checkpointing() -> None:
    for found in ranks.run(2, _chained):
        for name in ("compiled", "checkpointed"):
            assert all(torch.equal(*pair) for pair in zip(found[name], found["plain"], strict=True))
