"""What torch keeps of the rules from call to call, compiles, and says where a call is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

import resformer_kernels as ours
from resformer_kernels._core.op import OPS
from resformer_kernels.distributed import sharding
from resformer_kernels.distributed.sharding_rules import RULES
from tests.distributed import ranks
from tests.distributed.sharded import Given, attention, close, compare

pytestmark = pytest.mark.usefixtures("native")


def test_every_op_has_a_rule() -> None:
    below = {name for name, op in OPS.items() if ".distributed." not in f"{op.record.__module__}."}
    assert below == set(RULES)
    propagator = DTensor._op_dispatcher.sharding_propagator
    for name in set(OPS) - {name for name, rule in RULES.items() if isinstance(rule, str)}:
        for namespace in (torch.ops.resformer, torch.ops.resformer_triton):
            assert getattr(namespace, name).default in propagator.op_strategy_funcs


@pytest.mark.parametrize(
    ("extent", "sizes", "expected"),
    [(4, [2], [(0, 2), (2, 4)]), (5, [2, 2], [(0, 2), (2, 3), (3, 4), (4, 5)]),
     (4, [3], [(0, 2), (2, 4), (4, 4)]), (3, [], [(0, 3)])],
)  # fmt: skip
def test_parts_are_those_of_torch(
    extent: int, sizes: list[int], expected: list[tuple[int, int]]
) -> None:
    assert sharding._parts(extent, sizes) == expected


def _mesh_and(*shapes: tuple[int, ...]) -> tuple[Any, list[Tensor]]:
    return init_device_mesh("cpu", (2,)), [torch.randn(shape) for shape in shapes]


ROWS = (2, 5, 4, 8)


def _placed(x: Tensor, mesh: Any, *placements: Placement) -> DTensor:
    return distribute_tensor(x, mesh, placements)


def _calls_in_turn() -> None:
    """Each call differs from one before it in something that torch must not forget."""
    mesh, (x,) = _mesh_and(ROWS)
    for options in ({}, {"return_lse": True}, {"return_mixed_value": True}, {"return_lse": True}):
        compare(attention(**options), mesh, ("h",))
    sinks: dict[str, Any] = {"sinks": Given("h", (4,)), "lambda_v": Given("hd", (4, 1))}
    constant: dict[str, Any] = {
        "sinks": Given("h", (4,), "constant"),
        "lambda_v": Given("hd", (4, 1)),
    }
    for tensors in ({}, sinks, constant, sinks):
        compare(attention(**tensors), mesh, ("b",))
    # Gradients of some rows alone.
    for name in ("q", "k", "v_first"):
        unwanted: dict[str, Any] = {name: Given("bthd", ROWS, "constant")}
        compare(attention(batch=2, **unwanted), mesh, ("h",))
    dx = _placed(x, mesh, Shard(2))
    # One tensor, in either of two places.
    for absent in ("v", "v_first", "v"):
        given: dict[str, Any] = {"v": x, "v_first": x, absent: None}
        placed: dict[str, Any] = {
            name: None if value is None else dx for name, value in given.items()
        }
        close(
            ours.value_residual_attention(dx, dx, **placed, causal=True),
            ours.value_residual_attention(x, x, **given, causal=True),
            absent,
        )
    # Which of a mix's gradients are wanted.
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        value = torch.randn(ROWS)
        one = [value.clone().requires_grad_(wanted[0]), torch.randn(4, 1).requires_grad_(wanted[1])]
        both = [_placed(y.detach(), mesh, p).requires_grad_(y.requires_grad)
                for y, p in zip(one, (Shard(2), Replicate()), strict=True)]  # fmt: skip
        others = x.clone().requires_grad_(), _placed(x, mesh, Shard(2)).requires_grad_()
        for (v, c), other in zip((one, both), others, strict=True):
            ours.mix_values([v, other], [c, 0.5]).sin().sum().backward()
        for y, z in zip((*one, others[0]), (*both, others[1]), strict=True):
            assert (z.grad is None) == (y.grad is None)
            if y.grad is not None:
                close(z.grad, y.grad, f"mix {wanted}")


def test_what_torch_keeps_of_a_rule_is_all_that_decides() -> None:
    ranks.run(2, _calls_in_turn)


def _strided() -> None:
    mesh, (x, lambdas) = _mesh_and((2, 4, 5, 8), (4, 1))
    heads_first = [x.transpose(1, 2), _placed(x, mesh, Shard(1)).transpose(1, 2)]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3).transpose(1, 2)]
    turned.append(_placed(x.transpose(2, 3).contiguous(), mesh, Shard(1)).mT.transpose(1, 2))
    for one, many in (heads_first, turned):
        assert one.stride() == many.stride()
        c = _placed(lambdas, mesh, Replicate())
        expected = ours.value_residual_attention(one, one, one, one, lambdas, causal=True)
        close(ours.value_residual_attention(many, many, many, many, c, causal=True), expected, "")


def test_other_layouts_than_contiguous_ones() -> None:
    ranks.run(2, _strided)


def _compiled(first: bool) -> None:
    """`first`: before any call that is not compiled."""
    mesh, (*rows, c, sinks) = _mesh_and(*[ROWS] * 4, (4, 1), (4,))

    def call(q: Any, k: Any, v: Any, v_first: Any, c: Any, sinks: Any) -> Any:
        return ours.value_residual_attention(
            q, k, v, v_first, c, 0.3, sinks=sinks, causal=True, return_lse=True
        )

    run = torch.compile(call, fullgraph=True, backend="aot_eager")
    for place in (Shard(2), Shard(0))[: 1 if first else 2]:
        leaves = [_placed(x, mesh, place).requires_grad_() for x in rows]
        leaves += [_placed(x, mesh, Replicate()).requires_grad_() for x in (c, sinks)]
        found = []
        for function in (run, call):
            out, lse = function(*leaves)
            gradients = torch.autograd.grad(out.sin().sum() + lse.sin().sum(), leaves)
            found.append([out, lse, *gradients])
        for x, y in zip(*found, strict=True):
            assert x.placements == y.placements
            close(x, y.full_tensor(), f"compiled {place}")


def test_a_compiled_graph_of_attention() -> None:
    ranks.stop()
    ranks.run(2, _compiled, True)


def _refused() -> list[str]:
    mesh, (x, table) = _mesh_and(ROWS, (9, 4, 8))
    d = _placed(x, mesh, Shard(2))
    ids = torch.zeros(2, 5, dtype=torch.int64)
    cache = _placed(torch.zeros(2, 8, 4, 8), mesh, Shard(1))
    lengths = _placed(torch.zeros(2, dtype=torch.int32), mesh, Replicate())
    wide = d.double()
    rows, tokens = (_placed(y, mesh, Replicate()) for y in (table, ids))
    calls: tuple[Callable[[], Any], ...] = (
        lambda: ours.value_residual_attention(d, d, d, sinks=torch.zeros(4)),
        lambda: ours.value_residual_attention(
            x, x, x, sinks=_placed(table[0, :, 0], mesh, Shard(0))
        ),
        lambda: ours.value_residual_attention(d, d, d, lambda_v=torch.ones(4, 1), v_first=d),
        lambda: ours.mix_values([d, x], [0.5, 0.5]),
        lambda: ours.value_residual_attention(wide, wide, wide),
        lambda: ours.value_residual_attention(d, d, d, backend="reference"),
        lambda: ours.mix_value_embedding(d, rows, tokens, 0.5, sparse_grad=True),
        lambda: ours.attention_with_kvcache(d, cache, cache, d, d, cache_seqlens=lengths),
    )
    other = _placed(table[0, :, 0], init_device_mesh("cpu", (2, 1)), Replicate(), Replicate())
    calls += (lambda: ours.value_residual_attention(d, d, d, sinks=other),)
    said = []
    for call in calls:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
            call()
        said.append(f"{raised.type.__name__}: {raised.value}")
    said.append(str(ours.explain(ours.value_residual_attention, d, d, d)))
    return said


def _implicitly_replicated() -> None:
    mesh, (x, sinks, c) = _mesh_and(ROWS, (4,), (4, 1))
    found = []
    for rows in (x, _placed(x, mesh, Shard(2))):
        leaves = [sinks.clone().requires_grad_(), c.clone().requires_grad_()]
        with implicit_replication():
            out = ours.value_residual_attention(rows, rows, rows, rows, leaves[1], sinks=leaves[0])
            out.sin().sum().backward()
        found.append((out, *[leaf.grad for leaf in leaves]))
    for one, many in zip(*found, strict=True):
        close(many, one, "implicit replication")


def test_plain_tensors_that_torch_was_told_to_take_as_replicated() -> None:
    ranks.run(2, _implicitly_replicated)


def test_what_is_refused() -> None:
    expected = (
        r"TypeError: sinks must be a DTensor, as q is, got a plain tensor: .*distribute_tensor",
        r"TypeError: sinks must be a plain tensor, as q is, got a DTensor: pass its to_local\(\)",
        "TypeError: lambda_v must be a DTensor, as q is",
        r"TypeError: values\[1\] must be a DTensor, as values\[0\] is",
        "RuntimeError: .*no backend serves this call: .*float64; .*reference: .*these are DTensors",
        "RuntimeError: .*backend='reference' cannot serve this call: .*these are DTensors",
        "RuntimeError: sparse_grad=True makes a sparse gradient, which a DTensor cannot hold",
        r"RuntimeError: attention_with_kvcache writes in place.*got k_cache \(Shard\(dim=1\),\)",
        "ValueError: sinks must be on q's mesh .*, got ",
        "(?s)value_residual_attention: native.*not reference: .*these are DTensors",
    )
    for said in ranks.run(2, _refused):
        for text, pattern in zip(said, expected, strict=True):
            assert re.match(pattern, text), text
