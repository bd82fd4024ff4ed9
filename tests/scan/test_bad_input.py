"""Every wrong argument: an error that names it, what it got and what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resformer_kernels import linear_scan
from tests.tables import by_name

X = torch.randn(2, 3, 4)
PACKED = torch.randn(5, 4)
STATE = torch.randn(2, 4)


def offsets(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


FIXED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("tokens missing", {"tokens": None}, TypeError, "tokens must be a tensor"),
    ("tokens sparse", {"tokens": X.to_sparse()}, TypeError, "tokens must be a dense tensor"),
    ("tokens of rank 2", {"tokens": X[0]}, ValueError, r"tokens must be \(batch, time, channels\)"),
    ("tokens of rank 4", {"tokens": X[None]}, ValueError, "with cu_seqlens"),
    ("integers", {"tokens": X.long()}, TypeError, "tokens must be float32, bfloat16"),
    ("gates missing", {"gates": None}, TypeError, "gates must be a tensor"),
    ("gates a number", {"gates": 0.5}, TypeError, "gates must be a tensor"),
    ("gates sparse", {"gates": X.to_sparse()}, TypeError, "gates must be a dense tensor"),
    ("gates too short", {"gates": X[:, :2]}, ValueError, r"tokens' shape \(2, 3, 4\), or \(4,\)"),
    ("gates by batch", {"gates": X[:, :1]}, ValueError, "gates must have tokens' shape"),
    ("too few gates", {"gates": X[0, 0, :3]}, ValueError, r"got shape \(3,\)"),
    (
        "gates of integers",
        {"gates": X.long()},
        TypeError,
        "gates must be float32, bfloat16, .* got torch.int",
    ),
    ("gates elsewhere", {"gates": X.to("meta")}, ValueError, "gates must be on tokens' device"),
    ("a list as state", {"initial_state": [0.0]}, TypeError, "initial_state must be a tensor"),
    ("state of rank 3", {"initial_state": X}, ValueError, r"\(sequences, channels\)"),
    ("too few states", {"initial_state": STATE[:1]}, ValueError, r"one row a sequence, \(2, 4\)"),
    ("narrow state", {"initial_state": STATE[:, :3]}, ValueError, r"got shape \(2, 3\)"),
    ("state of bools", {"initial_state": STATE > 0}, TypeError, "initial_state must be float32, "),
    (
        "state elsewhere",
        {"initial_state": STATE.to("meta")},
        ValueError,
        "initial_state must be on",
    ),
    ("reverse", {"reverse": 1}, TypeError, "reverse must be True or False"),
    ("packed of rank 3", {"cu_seqlens": offsets(0, 3)}, ValueError, r"tokens must be \(total"),
]


@by_name("changed", "error", "says", table=FIXED)
def test_fixed(changed: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        linear_scan(**{"gates": X, "tokens": X, "initial_state": STATE, **changed})


SEQUENCES: list[tuple[str, Any, type[Exception], str]] = [
    ("a list", [0, 5], TypeError, "cu_seqlens must be a tensor"),
    ("rank 2", offsets(0, 5)[None], ValueError, r"cu_seqlens must be \(sequences \+ 1,\)"),
    ("int64", offsets(0, 5, dtype=torch.int64), TypeError, "cu_seqlens must be int32"),
    ("elsewhere", offsets(0, 5).to("meta"), ValueError, "cu_seqlens must be on tokens' device"),
    ("empty", offsets(), ValueError, "sequences \\+ 1 entries, got none"),
    ("starts late", offsets(1, 5), ValueError, "must start at 0, got 1"),
    ("goes back", offsets(0, 3, 2), ValueError, "not decrease, got 2 after 3 at index 2"),
    ("too long", offsets(0, 6), ValueError, "end within the 5 tokens, got 6"),
    ("other count", offsets(0, 2, 4, 5), ValueError, r"one row a sequence, \(3, 4\)"),
]


@by_name("cu_seqlens", "error", "says", table=SEQUENCES)
def test_packed(cu_seqlens: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        linear_scan(PACKED, PACKED, STATE, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("backend", ["cuda", "", None], ids=str)
def test_unknown_backend(backend: Any) -> None:
    with pytest.raises(ValueError, match="'auto' or one of 'native', 'triton', 'reference'"):
        linear_scan(X, X, backend=backend)


def test_float64_goes_to_the_reference() -> None:
    assert linear_scan(X.double(), X.double())[0].dtype is torch.float64
    for backend in ("native", "triton"):
        with pytest.raises(RuntimeError, match="serves float32, bfloat16, float16 and complex64"):
            linear_scan(X.double(), X.double(), backend=backend)
