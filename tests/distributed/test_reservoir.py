"""`reservoir_scan` on sequences that are split across ranks equals that on the whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from resformer_kernels import reservoir_scan
from resformer_kernels.distributed import context_parallel, traffic
from tests.distributed import ranks
from tests.reservoir.cases import Case, distance, leaf_of, problem, wide

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
]

CASES = [
    Case("dense", steps=37),
    Case("groups", units=21, steps=30, leak="scalar", seed=1),
    Case("diagonal", steps=25, inputs=None, bias=False, activation="relu", seed=2),
    Case("ring", steps=41, start=False, activation="sigmoid", seed=3),
    Case("permutation", steps=33, layout="strided", activation="softplus", seed=4),
    Case("csr", steps=29, leak="float", activation="identity", seed=5),
    Case("dense", steps=31, narrow=True, layout="sliced", seed=6),
    Case("dense", steps=1, seed=7),
    Case("dense", steps=5, batch=1, mode="chunked", seed=8),
    Case("dense", steps=0, mode="chunked", seed=9),
    Case("dense", steps=0, seed=10),
    Case("dense", batch=0, steps=9, seed=11),
    Case("dense", batch=0, steps=9, mode="chunked", seed=12),
    Case("dense", steps=1301, units=12, leak="float", mode="chunked", seed=13),
    Case("ring", steps=1201, units=9, batch=1, leak="scalar", mode="chunked", seed=14),
    Case("groups", steps=901, units=12, mode="chunked", start=False, seed=15),
    Case("dense", steps=903, mode="chunked", options={"reduce": "last"}, seed=16),
    Case("dense", steps=30, options={"reduce": "mean"}, seed=17),
    Case("dense", steps=452, mode="chunked", options={"reduce": "mean"}, seed=18),
    Case("dense", steps=33, batch=3, options={"reduce": "gram"}, seed=19),
    Case("dense", steps=650, batch=1, mode="chunked", options={"reduce": "gram"}, seed=20),
]
EXACT = [
    *(case for case in CASES if 0 < case.steps < 50 and case.kind in ("dense", "csr")),
    Case("dense", steps=600, units=8, batch=1, mode="chunked", seed=21),
    Case("dense", steps=20, activation="softmax", seed=22),
]
"""Those that run in float64 too, by the reference."""
ALONG = ("inputs", "targets")
"""Arguments whose axis 1 is the sequence."""


def _tensors(case: Case, exact: bool) -> dict[str, Any]:
    made = problem(case)
    tensors = dict(made.tensors)
    if case.options.get("reduce") == "gram":
        tensors["targets"] = made.grads[0][..., :2].contiguous()
    return {name: wide(x) for name, x in tensors.items()} if exact else tensors


def _weights(x: Tensor) -> Tensor:
    """Of a loss, by the number of the element: no two alike."""
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape).to(x.dtype)


def _results(
    case: Case, backend: str, tensors: dict[str, Any], loss: Callable[[str, Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """(outputs, gradients of the sum of their losses, info), by name."""
    found = {name: leaf_of(x) for name, x in tensors.items()}
    first, final, info = reservoir_scan(
        **{name: argument for name, (argument, _) in found.items()},
        activation=case.activation,
        mode=case.mode,
        return_info=True,
        backend=backend,
        **case.options,
    )
    outputs = {"final_state": final}
    if isinstance(first, tuple):
        outputs |= {"gram": first[0], "cross": first[1]}
    else:
        outputs["out"] = first
    leaves = {name: leaf for name, (_, leaf) in found.items() if leaf is not None}
    total = sum((loss(name, x) for name, x in outputs.items()), torch.zeros(()))
    gradients: Any = [torch.zeros_like(x) for x in leaves.values()]
    if total.requires_grad:
        gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    gradients = [g.to_dense() if g.layout is torch.sparse_csr else g for g in gradients]
    named = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in outputs.items()}, named, info


def _one(case: Case, balanced: bool, exact: bool) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    length, tensors = case.steps, _tensors(case, exact)
    with context_parallel(dist.group.WORLD, length=length, balanced=balanced) as sequence:
        parts = {name: sequence.shard(x, 1) if name in ALONG else x for name, x in tensors.items()}

        def loss(name: str, x: Tensor) -> Tensor:
            if name != "out" or "reduce" in case.options:
                # What every rank has: the ranks' losses sum to the whole's.
                rank, last = sequence.ranks.rank, sequence.ranks.count - 1
                return (x * _weights(x)).sum() * (0.25 * (rank == 0) + 0.75 * (rank == last))
            whole = _weights(x.new_empty((x.shape[0], length, x.shape[2])))
            return (x * sequence.shard(whole, 1)).sum()

        backend = "reference" if exact else "auto"
        outputs, gradients, info = _results(case, backend, parts, loss)
        for name, x in outputs.items():
            if name == "out" and "reduce" not in case.options:
                outputs[name] = sequence.gather(x, 1)
        for name, x in gradients.items():
            along = name[1:] in ALONG
            gradients[name] = sequence.gather(x, 1) if along else sequence.ranks.sum("d", x)
        return outputs | gradients, tuple(float(x) for x in info)


def _on_a_rank(balanced: bool) -> list[tuple[dict[str, Tensor], tuple[float, ...]]]:
    found = [_one(case, balanced, False) for case in CASES]
    return found + [_one(case, balanced, True) for case in EXACT]


@functools.cache
def _of_one_process(number: int, exact: bool) -> dict[str, Tensor]:
    """Case `number` by the kernels in float32, or by the reference in float64."""
    case = (*CASES, *EXACT)[number]
    backend, tensors = "reference" if exact else "auto", _tensors(case, exact)
    outputs, gradients, _ = _results(case, backend, tensors, lambda _, x: (x * _weights(x)).sum())
    return outputs | gradients


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_states_and_gradients_are_those_of_one_process(world: int, balanced: bool) -> None:
    found = ranks.run(world, _on_a_rank, balanced)
    for rank in found:
        for number, case in enumerate(CASES):
            got, info = rank[number]
            assert info == found[0][number][1]
            near, exact = _of_one_process(number, False), _of_one_process(number, True)
            for name, true in exact.items():
                assert got[name].shape == true.shape, (case, name)
                assert got[name].dtype is near[name].dtype, (case, name)
                allowed = 3 * distance(near[name], true) + 1e-5 * float(true.norm())
                assert distance(got[name], true) <= allowed, (case, name)
            if case.mode == "sequential" and not case.options:
                assert torch.equal(got["out"], near["out"])
                assert torch.equal(got["final_state"], near["final_state"])
        for number, case in enumerate(EXACT, len(CASES)):
            # Between pieces that run at once is a tolerance in float64 too.
            allowed = 1e-5 if case.mode == "chunked" else 1e-13
            for name, true in _of_one_process(number, True).items():
                assert distance(rank[number][0][name], true) <= allowed * float(true.norm()), (
                    case,
                    name,
                )


def _reservoir(
    units: int, length: int, radius: float, batch: int = 1
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A driven reservoir: (inputs, weight, the rest)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(units, units, generator=generator)
    weight *= radius / torch.linalg.eigvals(weight).abs().max()
    inputs = torch.randn(batch, length, 2, generator=generator)
    return inputs, weight, {"input_weight": torch.randn(units, 2, generator=generator), "leak": 0.3}


def _norm_keeping(length: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A linear reservoir that forgets nothing: its weight is a rotation, a little enlarged."""
    inputs, weight, _ = _reservoir(16, length, 1.0)
    rotation = torch.linalg.qr(weight).Q * 1.001
    return inputs[..., :1].expand(1, length, 16) / 10, rotation, {"activation": "identity"}


SWEEPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "forgets": (_reservoir(40, 4096, 0.9), {"mode": "chunked"}),
    "forgets, a batch": (_reservoir(40, 4096, 0.9, 3), {"mode": "chunked"}),
    "auto": (_reservoir(40, 4096, 0.9), {}),
    "auto, short": (_reservoir(40, 1000, 0.9), {}),
    "longer than a piece": (_reservoir(40, 640, 0.9), {"mode": "chunked", "leak": 0.04}),
    "keeps all": (_norm_keeping(400), {"mode": "chunked"}),
    "keeps all, in order": (_norm_keeping(400), {"mode": "sequential"}),
    "by bits": (_reservoir(40, 900, 0.9), {"mode": "chunked", "tolerance": 0.0}),
    "fewer steps than pieces": (_norm_keeping(5), {"mode": "chunked"}),
}


def _swept(balanced: bool) -> dict[str, tuple[Tensor, Tensor, list[float], int, int]]:
    found = {}
    for name, ((inputs, weight, rest), options) in SWEEPS.items():
        length = inputs.shape[1]
        with (
            context_parallel(dist.group.WORLD, length=length, balanced=balanced) as sequence,
            traffic() as moved,
        ):
            mine = sequence.shard(inputs, 1).requires_grad_()
            states, _, info = reservoir_scan(mine, weight, return_info=True, **rest | options)
            forward = moved.calls["ends"]
            grad = sequence.shard(torch.cos(torch.arange(float(length))[None, :, None]), 1)
            (d_inputs,) = torch.autograd.grad((states * grad).sum(), mine)
            moved_back = moved.calls["adjoints"]
            whole = sequence.gather(states.detach(), 1), sequence.gather(d_inputs, 1)
        found[name] = (*whole, [float(x) for x in info], forward, moved_back)
    return found


@pytest.mark.parametrize(("world", "balanced"), [(2, True), (3, False), (4, True)])
def test_sweeps(world: int, balanced: bool) -> None:
    found = ranks.run(world, _swept, balanced)
    for name, ((inputs, weight, rest), options) in SWEEPS.items():
        mine = inputs.clone().requires_grad_()
        states, _ = reservoir_scan(mine, weight, **rest | options | {"mode": "sequential"})
        grad = torch.cos(torch.arange(float(inputs.shape[1]))[None, :, None])
        (d_inputs,) = torch.autograd.grad((states * grad).sum(), mine)
        states = states.detach()
        for rank in found:
            got, got_d, (chunks, sweeps, mismatch, work, forgot), forward, backward = rank[name]
            assert (chunks, sweeps, mismatch, work) == tuple(found[0][name][2][:4])
            assert sweeps == forward, name
            assert distance(got_d, d_inputs) <= 1e-5 * float(d_inputs.norm()), name
            pieces = min(2 * world, inputs.shape[1])
            if name in ("forgets", "forgets, a batch", "auto"):
                assert (sweeps, forgot, backward) == (2, 1, 2)
                assert 1 < work < 2, name
                assert chunks > pieces
                assert float((got - states).abs().max()) < 3e-6
            elif name == "longer than a piece":
                assert 2 < sweeps <= 2 * pieces
                assert float((got - states).abs().max()) < 3e-6
            else:
                assert torch.equal(got, states), name
                assert sweeps <= pieces, name
                assert mismatch == 0
                assert backward <= pieces + 1
                # What is asked to be in order is not said to remember.
                assert forgot == (options.get("mode") != "chunked"), name


def _refused() -> dict[str, str]:
    found = {}
    inputs, weight, rest = _reservoir(8, 40, 0.9)
    with context_parallel(dist.group.WORLD, length=40) as sequence:
        mine = sequence.shard(inputs, 1)
        packed = torch.tensor([0, mine.shape[1]]).int()
        bias = torch.zeros(8, requires_grad=True)

        def twice() -> None:
            states, _ = reservoir_scan(mine, weight, bias=bias, **rest)
            (first,) = torch.autograd.grad(states.square().sum(), bias, create_graph=True)
            torch.autograd.grad(first.sum(), bias)

        calls: dict[str, Callable[[], object]] = {
            "packed": lambda: reservoir_scan(mine[0], weight, cu_seqlens=packed, **rest),
            "length": lambda: reservoir_scan(mine[:, 1:], weight, **rest),
            "twice": twice,
        }
        for name, call in calls.items():
            with pytest.raises((RuntimeError, ValueError)) as raised:
                call()
            found[name] = f"{raised.type.__name__}: {raised.value}"
        # What is no number spreads, in every mode, as in one process.
        mine[:] = mine.where(sequence.positions[None, :, None] != 21, torch.nan)
        for mode in ("chunked", "sequential"):
            states, _ = reservoir_scan(mine, weight, mode=mode, **rest)
            finite = sequence.gather(states, 1).isfinite()[0].all(1)
            found[mode] = str(int(finite.sum()))
            assert finite[:21].all()
    return found


def test_what_it_refuses_and_what_spreads() -> None:
    for found in ranks.run(2, _refused):
        assert found["packed"].startswith("RuntimeError: reservoir_scan with cu_seqlens cannot run")
        assert found["length"].startswith("ValueError: inputs must hold this rank's 20 of 40")
        assert "reservoir_scan does not support double backward" in found["twice"]
        assert found["chunked"] == found["sequential"] == "21"
