"""Every wrong argument: an error that names it, what it got and what it takes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from resformer_kernels import RingWeight, reservoir_scan
from resformer_kernels.reservoir.record import AdjointCall

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")

U, W = torch.randn(2, 5, 4), torch.randn(4, 4)
PACKED, OFFSETS = torch.randn(9, 4), torch.tensor([0, 4, 9], dtype=torch.int32)
ONES = torch.ones(4)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta
    CSR = W[:3].to_sparse_csr()


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no inputs", {"inputs": None}, TypeError, "inputs must be a tensor"),
    ("sparse inputs", {"inputs": U.to_sparse()}, TypeError, "inputs must be a dense tensor"),
    ("inputs of rank 2", {"inputs": U[0]}, ValueError, r"inputs must be \(batch, time, inputs\)"),
    ("integer inputs", {"inputs": U.long()}, TypeError, "inputs must be float32"),
    ("inputs too wide", {"inputs": U[..., :3]}, ValueError, "inputs must have weight's 4 units"),
    ("no weight", {"weight": None}, TypeError, "weight must be a tensor"),
    (
        "weight of rank 4",
        {"weight": W[None, None]},
        ValueError,
        r"weight must be a tensor \(N, N\)",
    ),
    ("weight not square", {"weight": W[:3]}, ValueError, r"weight must be a tensor \(N, N\)"),
    ("weight empty", {"weight": W[:0, :0]}, ValueError, r"weight must be a tensor \(N, N\)"),
    ("COO weight", {"weight": W.to_sparse()}, TypeError, "sparse CSR"),
    ("CSR not square", {"weight": CSR}, ValueError, "sparse CSR tensor of shape"),
    ("weight in half", {"weight": W.half()}, TypeError, "weight must be float32 or bfloat16"),
    ("weight elsewhere", {"weight": W.to("meta")}, ValueError, "weight must be on inputs' device"),
    (
        "narrow weight of a wide state",
        {"inputs": U.double(), "weight": W.bfloat16()},
        TypeError,
        "weight must be float64",
    ),
    ("ring of rank 2", {"weight": RingWeight(W)}, ValueError, "weight.values must be"),
    ("empty ring", {"weight": RingWeight(ONES[:0])}, ValueError, "at least one unit"),
    (
        "source no permutation",
        {"weight": RingWeight(ONES, torch.tensor([0, 1, 1, 2]))},
        ValueError,
        "weight.source must be a permutation",
    ),
    (
        "source of floats",
        {"weight": RingWeight(ONES, ONES)},
        TypeError,
        "weight.source must be int64",
    ),
    (
        "source too short",
        {"weight": RingWeight(ONES, torch.arange(3))},
        ValueError,
        r"weight.source must be \(4,\)",
    ),
    (
        "source elsewhere",
        {"weight": RingWeight(ONES, torch.arange(4, device="meta"))},
        ValueError,
        "weight.source must be on",
    ),
    ("input_weight of rank 1", {"input_weight": ONES}, ValueError, "input_weight must be"),
    ("input_weight turned", {"input_weight": torch.ones(3, 4)}, ValueError, r"must be \(4, 4\)"),
    ("input_weight in half", {"input_weight": W.half()}, TypeError, "input_weight must be float32"),
    (
        "no input",
        {"inputs": U[..., :0], "input_weight": torch.ones(4, 0)},
        ValueError,
        "at least one entry",
    ),
    ("leak above 1", {"leak": 1.5}, ValueError, r"leak must lie in \[0, 1\], got 1.5"),
    ("leak NaN", {"leak": float("nan")}, ValueError, "leak must lie"),
    ("leak a string", {"leak": "1"}, TypeError, "leak must be a number"),
    ("leak of two", {"leak": torch.ones(2)}, ValueError, r"leak must be a number, \(\) or \(4,\)"),
    ("leak in half", {"leak": ONES.half()}, TypeError, "leak must have the state's dtype"),
    ("bias of rank 2", {"bias": W}, ValueError, "bias must be"),
    ("bias of three", {"bias": ONES[:3]}, ValueError, r"bias must be \(4,\)"),
    ("bias a number", {"bias": 0.5}, TypeError, "bias must be a tensor"),
    ("bias elsewhere", {"bias": ONES.to("meta")}, ValueError, "bias must be on inputs' device"),
    ("state of one", {"initial_state": torch.ones(1, 4)}, ValueError, "initial_state must be"),
    (
        "state in double",
        {"initial_state": torch.ones(2, 4).double()},
        TypeError,
        "initial_state must have the state's dtype",
    ),
    ("activation", {"activation": "gelu"}, ValueError, "activation must be one of"),
    ("mode", {"mode": "parallel"}, ValueError, "mode must be one of"),
    ("reduce", {"reduce": "sum"}, ValueError, "reduce must be one of"),
    ("tolerance negative", {"tolerance": -1e-6}, ValueError, "tolerance must be 0 or"),
    ("tolerance infinite", {"tolerance": float("inf")}, ValueError, "tolerance must be 0 or"),
    ("tolerance a string", {"tolerance": "small"}, TypeError, "tolerance must be a number"),
    ("info a number", {"return_info": 1}, TypeError, "return_info must be True or False"),
    ("targets alone", {"targets": U}, ValueError, "targets are for reduce='gram'"),
    (
        "targets of other steps",
        {"targets": U[:, :4], "reduce": "gram"},
        ValueError,
        "targets must have inputs' steps",
    ),
    ("targets of rank 2", {"targets": U[0], "reduce": "gram"}, ValueError, "targets must be"),
    ("integer targets", {"targets": U.long(), "reduce": "gram"}, TypeError, "targets must be"),
    (
        "targets elsewhere",
        {"targets": U.to("meta"), "reduce": "gram"},
        ValueError,
        "targets must be on",
    ),
    ("a batch packed", {"cu_seqlens": OFFSETS}, ValueError, r"inputs must be \(total_steps"),
    (
        "offsets in int64",
        {"inputs": PACKED, "cu_seqlens": OFFSETS.long()},
        TypeError,
        "cu_seqlens must be int32",
    ),
    (
        "offsets of rank 2",
        {"inputs": PACKED, "cu_seqlens": OFFSETS[None]},
        ValueError,
        "cu_seqlens must be",
    ),
    (
        "no offsets",
        {"inputs": PACKED, "cu_seqlens": OFFSETS[:0]},
        ValueError,
        "must have sequences",
    ),
    (
        "offsets elsewhere",
        {"inputs": PACKED, "cu_seqlens": OFFSETS.to("meta")},
        ValueError,
        "cu_seqlens must be on",
    ),
    (
        "offsets start late",
        {"inputs": PACKED, "cu_seqlens": offsets(1, 4)},
        ValueError,
        "must start at 0, got 1",
    ),
    (
        "offsets decrease",
        {"inputs": PACKED, "cu_seqlens": offsets(0, 4, 3)},
        ValueError,
        "must not decrease, got 3 after 4 at index 2",
    ),
    (
        "offsets too far",
        {"inputs": PACKED, "cu_seqlens": offsets(0, 10)},
        ValueError,
        "must end within inputs' 9 steps, got 10",
    ),
    ("backend", {"backend": "cuda"}, ValueError, "backend must be 'auto' or one of"),
    (
        "native in double",
        {"inputs": U.double(), "weight": W.double(), "backend": "native"},
        RuntimeError,
        "its state is float32",
    ),
]


@pytest.mark.parametrize(
    ("wrong", "error", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_errors(wrong: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments: dict[str, Any] = {"inputs": U, "weight": W, **wrong}
    with pytest.raises(error, match=says):
        reservoir_scan(**arguments)


@pytest.mark.usefixtures("native")
def test_the_ops_check_what_they_are_given() -> None:
    ops = torch.ops.resformer
    leak = torch.tensor(0.5)

    def forward(u: Any = U, w: Any = W, **changed: Any) -> Any:
        given = {
            "rows": None,
            "columns": None,
            "input_weight": None,
            "leak": leak,
            "bias": None,
            "initial_state": None,
            "activation": 0,
            "mode": 1,
            "tolerance": 0.0,
            "cu_seqlens": None,
            **changed,
        }
        return ops.reservoir_scan_forward(u, w, *given.values())

    def adjoint(**changed: Any) -> Any:
        none = torch.zeros((), dtype=torch.float64)
        given = AdjointCall(U, U, W, None, None, leak, 1, none, None)
        return ops.reservoir_scan_adjoint(*given._replace(**changed))

    forward()
    adjoint()
    index = torch.arange(4)
    wrong = [
        lambda: forward(U[..., :3]),
        lambda: forward(U[0]),
        lambda: forward(U.double()),
        lambda: forward(U[:, :, ::2], torch.ones(2)),
        lambda: forward(w=W[:3]),
        lambda: forward(w=W.half()),
        lambda: forward(w=ONES, columns=index + 1),
        lambda: forward(w=ONES, columns=index[:3]),
        lambda: forward(w=ONES, columns=index, rows=torch.tensor([0, 1, 2, 3, 5])),
        lambda: forward(w=ONES, columns=index, rows=torch.tensor([0, 3, 2, 3, 4])),
        lambda: forward(w=ONES, columns=index.int()),
        lambda: forward(input_weight=torch.ones(3, 4)),
        lambda: forward(leak=torch.ones(3)),
        lambda: forward(leak=leak.double()),
        lambda: forward(bias=torch.ones(5)),
        lambda: forward(initial_state=torch.ones(1, 4)),
        lambda: forward(PACKED, cu_seqlens=offsets(0, 10)),
        lambda: forward(PACKED, cu_seqlens=offsets(0, 4, 2)),
        lambda: forward(activation=3),
        lambda: forward(mode=-1),
        lambda: adjoint(slope=U[:1]),
        lambda: adjoint(slope=U.mT),
        lambda: adjoint(weight=ONES, columns=torch.zeros(4, dtype=torch.int64)),
        lambda: adjoint(tolerance=torch.tensor(0.0)),
    ]
    for call in wrong:
        with pytest.raises(RuntimeError):
            call()
