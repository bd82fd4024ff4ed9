"""How a backward is computed: on a sparse pattern alone, and without the host waiting for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resformer_kernels import reservoir_scan
from resformer_kernels._core.op import NATIVE
from resformer_kernels._core.select import prepare
from resformer_kernels.reservoir import gradients, segments
from resformer_kernels.reservoir.op import FORWARD, LEAVES
from resformer_kernels.reservoir.record import BackwardCall, ReducedCall
from tests.reservoir.cases import KINDS, Case, Problem, problem

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
]

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")


class Watch(TorchDispatchMode):
    """Records the largest dense result of any op, and the ops for which a host waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)]
        by_mask = name.startswith("index") and any(x.dtype is torch.bool for x in tensors)
        unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITS or by_mask or unknown_size:
            self.waits.append(str(func))
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.layout is torch.strided:
                self.largest = max(self.largest, x.numel())
        return result


def call_of(made: Problem, reduce: str = "none") -> ReducedCall:
    options = {"activation": made.case.activation, "cu_seqlens": made.cu_seqlens, "reduce": reduce}
    found: ReducedCall = prepare(reservoir_scan, **made.tensors, **options).call
    return found


def backward_of(made: Problem) -> BackwardCall:
    scan = call_of(made).scan
    scan = scan._replace(inputs=scan.inputs.contiguous())
    states = FORWARD(NATIVE, scan)[0]
    return BackwardCall(*made.grads, scan, states, 0b111111)


@pytest.mark.parametrize("lengths", [None, (5, 0, 17, 1, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_waits_for_no_device(
    kind: str, lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = backward_of(problem(Case(kind, lengths=lengths, seed=3)))
    expected = gradients.backward(NATIVE, call)
    monkeypatch.setattr(gradients, "host_may_read", lambda _: False)
    with Watch() as watch:
        found = gradients.backward(NATIVE, call)
    assert not watch.waits
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduce", ["last", "mean", "gram"])
def test_a_reduction_waits_for_no_device(reduce: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "segment_length", lambda *_: 8)
    call = call_of(problem(Case()), reduce)
    with Watch() as watch:
        segments.reduced(NATIVE, call)
    assert not watch.waits


def test_a_sparse_gradient_is_computed_on_its_pattern() -> None:
    units, entries = 3000, 9000
    places = torch.randint(units * units, (entries,)).unique()
    rows, columns = places // units, places % units
    starts = torch.searchsorted(rows, torch.arange(units + 1))
    shape, values = (units, units), torch.randn(len(places))
    weight = torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=True)
    inputs, grad = torch.randn(2, 4, units), torch.randn(2, 4, units)
    dense = weight.to_dense().double().requires_grad_()
    states, _ = reservoir_scan(inputs.double(), dense, leak=0.5, backend="reference")
    (expected,) = torch.autograd.grad(states, dense, grad.double())

    tensors = dict.fromkeys(LEAVES) | {"inputs": inputs, "weight": weight, "leak": 0.5}
    scan = call_of(Problem(Case(), tensors, None, (grad, grad))).scan
    call = BackwardCall(grad, None, scan, FORWARD(NATIVE, scan)[0], 0b10)
    with Watch() as watch:
        found = gradients.backward(NATIVE, call)[1]
    assert watch.largest < units * units // 10
    true = expected[rows, columns]
    assert float((found.double() - true).norm()) <= 1e-6 * float(true.norm())
