"""The ops under PyTorch's machinery: opcheck, compile, autocast, checkpointing, transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from resformer_kernels import reservoir_scan
from resformer_kernels._core import dtensors
from resformer_kernels.distributed import sharding
from tests.reservoir.checks import check_compiles_whole, check_op

pytestmark = [
    pytest.mark.usefixtures("native"),
    # Raised inside torch while it compiles and while it loads its forward-mode rules.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
]


def leaves(steps: int = 9, batch: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(steps)
    shapes = ((batch, steps, 3), (8, 8), (8, 3), (8,), (8,), (batch, 8))
    return tuple((torch.randn(shape) * 0.4).requires_grad_() for shape in shapes)


def scan(*x: Tensor) -> Any:
    return reservoir_scan(
        x[0], x[1], input_weight=x[2], leak=x[3], bias=x[4], initial_state=x[5], backend="native"
    )


def gradients(function: Any, given: tuple[Tensor, ...]) -> list[Tensor]:
    states, last = function(*given)
    return [
        states.detach(),
        last.detach(),
        *torch.autograd.grad(states.square().sum() + last.sum(), given),
    ]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    u, w, w_in, a, b, h = (x.detach() for x in leaves())
    index = torch.randperm(8)
    rows = torch.tensor([0, 1, 1, 3, 4, 5, 5, 7, 8])
    packed = (torch.tensor([0, 4, 7], dtype=torch.int32),)
    shared: list[tuple[Any, ...]] = [
        (u, w, None, None, w_in, a, b, h, 0, 0, 1e-6, None),
        (u, w.view(1, 8, 8), None, None, w_in, a, None, None, 1, 2, 1e-6, None),
        (u, a, None, index, w_in, a, b, h, 0, 1, 1e-6, None),
        (u, a, rows, index, w_in, a, b, h, 0, 1, 1e-6, None),
        (u[0].contiguous(), w, None, None, w_in, torch.tensor(0.5), b, h, 0, 1, 1e-6, *packed),
    ]
    for given in shared:
        check_op("resformer", given, given[0])


@pytest.mark.parametrize("beside_dtensors", [False, True])
def test_compiles_whole_with_dynamic_length_and_batch(
    beside_dtensors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a process whose ops were given DTensors before: calls are then looked through for them.
    monkeypatch.setattr(dtensors, "_rules", [sharding] if beside_dtensors else [])
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, batch in ((6, 5), (9, 7), (17, 11)):
            given = leaves(steps, batch)
            same(gradients(compiled, given), gradients(scan, given))


@pytest.mark.parametrize("reduce", ["mean", "gram"])
def test_compiles_whole_with_info_and_reductions(reduce: str) -> None:
    check_compiles_whole("native", leak=0.5, reduce=reduce)


def test_a_float_leak_does_not_recompile() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda u, w, a: reservoir_scan(u, w, leak=a), fullgraph=True, backend=counter
    )
    u, w = torch.randn(1, 4, 3), torch.randn(3, 3)
    for leak in (0.1, 0.2, 0.3, 0.4):
        got, _ = compiled(u, w, leak)
        torch.testing.assert_close(got, reservoir_scan(u, w, leak=leak)[0])
    assert counter.frame_count <= 2


def test_autocast_leaves_the_recurrence_alone() -> None:
    given = tuple(x.detach() for x in leaves())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, _ = scan(*given)
    assert states.dtype is torch.float32
    assert torch.equal(states, scan(*given)[0])


def test_checkpointing() -> None:
    given = leaves()
    same(
        gradients(lambda *x: checkpoint(scan, *x, use_reentrant=False), given),
        gradients(scan, given),
    )


def test_a_sparse_leaf_gets_a_sparse_gradient() -> None:
    dense = torch.randn(8, 8) * (torch.rand(8, 8) < 0.4)
    sparse = dense.to_sparse_csr().requires_grad_()
    dense.requires_grad_()
    for weight in (sparse, dense):
        states, _ = reservoir_scan(torch.ones(1, 20, 8), weight, leak=0.5, backend="native")
        states.sum().backward()
    assert sparse.grad is not None
    assert dense.grad is not None
    assert sparse.grad.layout is torch.sparse_csr
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad * (dense != 0))


def test_gradients_are_not_differentiable_again() -> None:
    given = leaves()
    found = torch.autograd.grad(scan(*given)[0].square().sum(), given, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        found[0].sum().backward()


def test_vmap_says_no() -> None:
    given = tuple(x.detach()[None] for x in leaves())
    with pytest.raises(RuntimeError, match=r"does not support torch.func.vmap"):
        torch.func.vmap(scan)(*given)


def test_forward_mode_says_no() -> None:
    first, *rest = (x.detach() for x in leaves())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            scan(dual, *rest)
