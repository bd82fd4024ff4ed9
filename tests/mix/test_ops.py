"""The ops under PyTorch's machinery: opcheck, compile, autocast, checkpointing, transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import mix_value_embedding, mix_values
from tests.machinery import (  # noqa: F401
    check_compiles_whole,
    test_checkpointing,
    test_forward_mode_says_no,
    test_gradients_are_not_differentiable_again,
    test_vmap_says_no,
)
from tests.mix.calls import values_calls, wrong_values_calls

pytestmark = [
    # Raised inside torch while it compiles and while it loads its forward-mode rules.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def values_of(rows: int = 6, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (torch.randn(batch, rows, 2, 4, requires_grad=True) for _ in range(2))
    return a, b, torch.randn(2, 1, requires_grad=True)


def embedding_of(rows: int = 6, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = torch.randn(batch, rows, 2, 4, requires_grad=True)
    table = torch.randn(9, 2, 4, requires_grad=True)
    gate = torch.randn(batch, rows, 2, 1, requires_grad=True)
    return v, table, torch.randint(9, (batch, rows)), gate


def mix(a: Tensor, b: Tensor, head: Tensor, *, backend: str) -> Tensor:
    return mix_values([a, b, a], [head, 0.5, 2.0], backend=backend)


def embed(v: Tensor, table: Tensor, ids: Tensor, gate: Tensor, *, backend: str) -> Tensor:
    return mix_value_embedding(v, table, ids, gate, backend=backend)


@pytest.fixture(params=["values", "embedding"])
def made(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Arguments of the op that `function` calls."""
    return values_of if request.param == "values" else embedding_of


@pytest.fixture
def make(made: Callable[..., Any]) -> Callable[..., Any]:
    return made


@pytest.fixture
def function(made: Callable[..., Any], kernels: str) -> Callable[..., Tensor]:
    """One of the mixing ops, on one backend."""
    return functools.partial(mix if made is values_of else embed, backend=kernels)


def test_opcheck(kernels: str) -> None:
    ops = torch.ops.resformer if kernels == "native" else torch.ops.resformer_triton
    a, gate = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 1, 1)
    table, ids = torch.randn(7, 2, 4), torch.randint(7, (2, 5))
    calls = [
        *values_calls(ops),
        (ops.mix_value_embedding_forward, (a, table, ids, gate, 1.0, False)),
        (ops.mix_value_embedding_forward, (a, table, ids, None, 0.5, True)),
        (ops.mix_value_embedding_backward, (a, table, ids, gate, 1.0, 3)),
        (ops.mix_value_embedding_backward, (a, table, ids, None, 0.5, 1)),
        (ops.mix_value_embedding_backward_sparse, (a, table, ids, gate, 1.0)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def test_compiles_whole_with_dynamic_length_and_batch(function: Any, make: Any) -> None:
    check_compiles_whole(function, lambda rows: make(rows, rows // 2), (6, 9, 17))


def test_a_float_coefficient_does_not_recompile(kernels: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda a, b, c: mix_values([a, b], [c, 0.5], backend=kernels),
        fullgraph=True,
        backend=counter,
    )
    a, b, _ = values_of()
    for c in (0.1, 0.2, 0.3, 0.4):
        torch.testing.assert_close(compiled(a, b, c), mix_values([a, b], [c, 0.5]))
    assert counter.frame_count <= 2


def test_autocast_casts_values_alone(function: Any, make: Any) -> None:
    inputs = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(*inputs)
    assert out.dtype is torch.bfloat16
    leaves = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad(out.float().sum(), leaves)
    assert all(g.dtype is torch.float32 for g in found)


def test_sparse_gradient_says_no_to_a_whole_graph(native: str) -> None:
    torch._dynamo.reset()
    v, table, ids, gate = embedding_of()
    compiled = torch.compile(
        lambda *x: mix_value_embedding(*x, sparse_grad=True, backend=native),
        backend="eager",
        fullgraph=True,
    )
    with pytest.raises(RuntimeError, match="sparse_grad"):
        compiled(v, table, ids, gate)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_the_op_itself_checks_ids(bad: int) -> None:
    v, table, ids, gate = (x.detach() for x in embedding_of())
    ids[1, 2] = bad
    for call in (
        lambda: torch.ops.resformer.mix_value_embedding_forward(v, table, ids, gate, 1.0, False),
        lambda: torch.ops.resformer.mix_value_embedding_backward(v, table, ids, gate, 1.0, 3),
        lambda: torch.ops.resformer.mix_value_embedding_backward_sparse(v, table, ids, gate, 1.0),
    ):
        with pytest.raises(RuntimeError, match=f"token_ids holds {bad}"):
            call()


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_an_unchecked_id_reads_and_writes_nothing(bad: int, kernels: str) -> None:
    # On a GPU ids are checked on request alone: to read them the host would have to wait.
    assert kernels == "triton"
    v, table, ids, gate = (x.detach() for x in embedding_of())
    ids[1, 2] = bad
    ops = torch.ops.resformer_triton
    out = ops.mix_value_embedding_forward(v, table, ids, gate, 1.0, False)
    lost = torch.zeros(2, 6, dtype=torch.bool)
    lost[1, 2] = True
    assert out[lost].isnan().all()
    assert out[~lost].isfinite().all()
    d_table, d_gate = ops.mix_value_embedding_backward(v, table, ids, gate, 1.0, 3)
    assert d_table.isfinite().all()
    assert d_gate[lost].isnan().all()
    assert d_gate[~lost].isfinite().all()


@pytest.mark.usefixtures("native")
def test_the_op_itself_checks_shapes() -> None:
    v, table, ids, gate = (x.detach() for x in embedding_of())
    ops = torch.ops.resformer
    forward, backward = ops.mix_value_embedding_forward, ops.mix_value_embedding_backward
    wrong = [
        *wrong_values_calls(ops),
        (forward, (v, table[:, :1], ids, gate, 1.0, False)),
        (forward, (v, table.half(), ids, gate, 1.0, False)),
        (forward, (v, table, ids[:, :3], gate, 1.0, False)),
        (forward, (v, table, ids.short(), gate, 1.0, False)),
        (backward, (v, table, ids, None, 1.0, 2)),
    ]
    for op, arguments in wrong:
        with pytest.raises(RuntimeError):
            op(*arguments)
