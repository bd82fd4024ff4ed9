"""Every wrong argument: an error that names it, what it got and what it takes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from resformer_kernels import RingWeight, reservoir_scan
from tests.reservoir.checks import check_refusals

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")

U, W = torch.randn(2, 5, 4), torch.randn(4, 4)
PACKED, OFFSETS = torch.randn(9, 4), torch.tensor([0, 4, 9], dtype=torch.int32)
ONES = torch.ones(4)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta
    CSR = W[:3].to_sparse_csr()


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bad(name: str, error: type[Exception], says: str, **wrong: Any) -> Any:
    return pytest.param(wrong, error, says, id=name)


def bad_offsets(name: str, error: type[Exception], says: str, cu_seqlens: torch.Tensor) -> Any:
    return bad(name, error, says, inputs=PACKED, cu_seqlens=cu_seqlens)


def ring(source: torch.Tensor) -> RingWeight:
    return RingWeight(ONES, source)


BAD = [
    bad("no inputs", TypeError, "inputs must be a tensor", inputs=None),
    bad("sparse inputs", TypeError, "inputs must be a dense tensor", inputs=U.to_sparse()),
    bad("inputs of rank 2", ValueError, r"inputs must be \(batch, time, inputs\)", inputs=U[0]),
    bad("integer inputs", TypeError, "inputs must be float32", inputs=U.long()),
    bad("inputs too wide", ValueError, "inputs must have weight's 4 units", inputs=U[..., :3]),
    bad("no weight", TypeError, "weight must be a tensor", weight=None),
    bad("weight of rank 4", ValueError, r"weight must be a tensor \(N, N\)", weight=W[None, None]),
    bad("weight not square", ValueError, r"weight must be a tensor \(N, N\)", weight=W[:3]),
    bad("weight empty", ValueError, r"weight must be a tensor \(N, N\)", weight=W[:0, :0]),
    bad("COO weight", TypeError, "sparse CSR", weight=W.to_sparse()),
    bad("CSR not square", ValueError, "sparse CSR tensor of shape", weight=CSR),
    bad("weight in double", TypeError, "weight must have the state's dtype", weight=W.double()),
    bad("weight elsewhere", ValueError, "weight must be on inputs' device", weight=W.to("meta")),
    bad(
        "narrow weight of a wide state",
        TypeError,
        "weight must have the state's dtype torch.float64, or bfloat16 or float16, got torch.fl",
        inputs=U.double(),
    ),
    bad("ring of rank 2", ValueError, "weight.values must be", weight=RingWeight(W)),
    bad("empty ring", ValueError, "at least one unit", weight=RingWeight(ONES[:0])),
    bad(
        "source no permutation",
        ValueError,
        "weight.source must be a permutation",
        weight=ring(torch.tensor([0, 1, 1, 2])),
    ),
    bad("source of floats", TypeError, "weight.source must be int64", weight=ring(ONES)),
    bad(
        "source too short",
        ValueError,
        r"weight.source must be \(4,\)",
        weight=ring(torch.arange(3)),
    ),
    bad(
        "source elsewhere",
        ValueError,
        "weight.source must be on",
        weight=ring(torch.arange(4, device="meta")),
    ),
    bad("input_weight of rank 1", ValueError, "input_weight must be", input_weight=ONES),
    bad("input_weight turned", ValueError, r"must be \(4, 4\)", input_weight=torch.ones(3, 4)),
    bad(
        "input_weight in double",
        TypeError,
        "input_weight must have the state",
        input_weight=W.double(),
    ),
    bad(
        "no input",
        ValueError,
        "at least one entry",
        inputs=U[..., :0],
        input_weight=torch.ones(4, 0),
    ),
    bad("leak above 1", ValueError, r"leak must lie in \[0, 1\], got 1.5", leak=1.5),
    bad("leak NaN", ValueError, "leak must lie", leak=float("nan")),
    bad("leak a string", TypeError, "leak must be a number", leak="1"),
    bad("leak of two", ValueError, r"leak must be a number, \(\) or \(4,\)", leak=torch.ones(2)),
    bad("leak in double", TypeError, "leak must have the state's dtype", leak=ONES.double()),
    bad("bias of rank 2", ValueError, "bias must be", bias=W),
    bad("bias of three", ValueError, r"bias must be \(4,\)", bias=ONES[:3]),
    bad("bias a number", TypeError, "bias must be a tensor", bias=0.5),
    bad("bias elsewhere", ValueError, "bias must be on inputs' device", bias=ONES.to("meta")),
    bad("state of one", ValueError, "initial_state must be", initial_state=torch.ones(1, 4)),
    bad(
        "state in double",
        TypeError,
        "initial_state must have the state's dtype",
        initial_state=torch.ones(2, 4).double(),
    ),
    bad("activation", ValueError, "activation must be one of", activation="gelu"),
    bad("mode", ValueError, "mode must be one of", mode="parallel"),
    bad("reduce", ValueError, "reduce must be one of", reduce="sum"),
    bad("tolerance negative", ValueError, "tolerance must be 0 or", tolerance=-1e-6),
    bad("tolerance infinite", ValueError, "tolerance must be 0 or", tolerance=float("inf")),
    bad("tolerance a string", TypeError, "tolerance must be a number", tolerance="small"),
    bad("info a number", TypeError, "return_info must be True or False", return_info=1),
    bad("targets alone", ValueError, "targets are for reduce='gram'", targets=U),
    bad(
        "targets of other steps",
        ValueError,
        "targets must have inputs' steps",
        targets=U[:, :4],
        reduce="gram",
    ),
    bad("targets of rank 2", ValueError, "targets must be", targets=U[0], reduce="gram"),
    bad("integer targets", TypeError, "targets must be", targets=U.long(), reduce="gram"),
    bad("targets elsewhere", ValueError, "targets must be on", targets=U.to("meta"), reduce="gram"),
    bad("a batch packed", ValueError, r"inputs must be \(total_steps", cu_seqlens=OFFSETS),
    bad_offsets("offsets in int64", TypeError, "cu_seqlens must be int32", OFFSETS.long()),
    bad_offsets("offsets of rank 2", ValueError, "cu_seqlens must be", OFFSETS[None]),
    bad_offsets("no offsets", ValueError, "must have sequences", OFFSETS[:0]),
    bad_offsets("offsets elsewhere", ValueError, "cu_seqlens must be on", OFFSETS.to("meta")),
    bad_offsets("offsets start late", ValueError, "must start at 0, got 1", offsets(1, 4)),
    bad_offsets(
        "offsets decrease",
        ValueError,
        "must not decrease, got 3 after 4 at index 2",
        offsets(0, 4, 3),
    ),
    bad_offsets(
        "offsets too far", ValueError, "must end within inputs' 9 steps, got 10", offsets(0, 10)
    ),
    bad("backend", ValueError, "backend must be 'auto' or one of", backend="cuda"),
    bad(
        "native in double",
        RuntimeError,
        "its state is float32",
        inputs=U.double(),
        weight=W.double(),
        backend="native",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "says"), BAD)
def test_errors(wrong: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments: dict[str, Any] = {"inputs": U, "weight": W, **wrong}
    with pytest.raises(error, match=says):
        reservoir_scan(**arguments)


@pytest.mark.usefixtures("native")
def test_the_ops_check_what_they_are_given() -> None:
    index = torch.arange(4)
    check_refusals(
        "resformer",
        [
            {"inputs": U[:, :, ::2], "weight": torch.ones(2)},
            {"weight": ONES, "columns": index + 1},
            {"weight": ONES, "columns": index[:3]},
            {"weight": ONES, "columns": index, "rows": torch.tensor([0, 1, 2, 3, 5])},
            {"weight": ONES, "columns": index, "rows": torch.tensor([0, 3, 2, 3, 4])},
            {"weight": ONES, "columns": index.int()},
            {"leak": torch.tensor(0.5).double()},
            {"inputs": PACKED, "cu_seqlens": offsets(0, 10)},
            {"inputs": PACKED, "cu_seqlens": offsets(0, 4, 2)},
            {"mode": -1},
        ],
        [
            {"slope": U[:1]},
            {"slope": U.mT},
            {"weight": ONES, "columns": torch.zeros(4, dtype=torch.int64)},
            {"tolerance": torch.tensor(0.0)},
        ],
    )
