"""Every wrong argument: an error that names it, what it got and what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resformer_kernels import mix_value_embedding, mix_values
from tests.tables import by_name

V = torch.randn(2, 3, 2, 4)
TABLE = torch.randn(5, 2, 4)
IDS = torch.tensor([[0, 1, 2], [3, 4, 4]])

BAD_VALUES: list[tuple[str, Any, Any, type[Exception], str]] = [
    ("a bare tensor", V, [1.0], TypeError, "values must be a list or tuple"),
    ("no values", [], [], ValueError, "at least one tensor"),
    ("a bare coefficient", [V], 1.0, TypeError, "coefficients must be a sequence of floats"),
    ("too few", [V, V], [1.0], ValueError, "one entry for each of the 2 values, got 1"),
    ("too many", [V], [1.0, 2.0], ValueError, "one entry for each of the 1 values, got 2"),
    ("a number as value", [V, 3.0], [1.0, 1.0], TypeError, r"values\[1\] must be a tensor"),
    ("None as value", [None], [1.0], TypeError, r"values\[0\] must be a tensor"),
    ("sparse", [V.to_sparse()], [1.0], TypeError, r"values\[0\] must be a dense tensor"),
    ("rank 2", [V[0, 0]], [1.0], ValueError, r"values\[0\] must be \(batch"),
    ("rank 5", [V[None]], [1.0], ValueError, r"values\[0\] must be \(batch"),
    ("integers", [V.long()], [1.0], TypeError, r"values\[0\] must be float32"),
    ("two shapes", [V, V[:, :2]], [1.0, 1.0], ValueError, r"values\[1\] must have the shape"),
    ("broadcastable", [V, V[:, :1]], [1.0, 1.0], ValueError, r"values\[1\] must have the shape"),
    ("two dtypes", [V, V.half()], [1.0, 1.0], TypeError, r"values\[1\] must have the dtype"),
    ("two devices", [V, V.to("meta")], [1.0, 1.0], ValueError, r"values\[1\] must be on"),
    ("a string", [V], ["1"], TypeError, r"coefficients\[0\] must be a number"),
    ("None", [V], [None], TypeError, r"coefficients\[0\] must be a number"),
    ("a bool", [V], [True], TypeError, r"coefficients\[0\] must be a number"),
    ("per head, bare", [V], [torch.ones(2)], ValueError, r"has shape \(2, 1\)"),
    ("too many heads", [V], [torch.ones(4, 1)], ValueError, r"broadcasts to values\[0\]'s shape"),
    ("enlarges", [V], [torch.ones(7, 2, 3, 2, 4)], ValueError, "without enlarging it"),
    ("enlarges an axis", [V[:1]], [torch.ones(2, 1, 1, 1)], ValueError, "without enlarging"),
    ("half for float32", [V], [torch.ones((), dtype=torch.float16)], TypeError, "float32 or"),
    ("integer tensor", [V], [torch.ones((), dtype=torch.int64)], TypeError, "float32 or"),
    ("coefficient elsewhere", [V], [torch.ones((), device="meta")], ValueError, "must be on"),
]


@by_name("values", "coefficients", "error", "says", table=BAD_VALUES)
def test_values(values: Any, coefficients: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        mix_values(values, coefficients)


BAD_EMBEDDINGS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("v missing", {"v": None}, TypeError, "v must be a tensor"),
    ("v of rank 2", {"v": V[0, 0]}, ValueError, "v must be"),
    ("v of integers", {"v": V.int()}, TypeError, "v must be float32"),
    ("table missing", {"table": None}, TypeError, "table must be a tensor"),
    ("table of rank 2", {"table": TABLE.flatten(1)}, ValueError, r"table must be \(vocab"),
    ("table of other heads", {"table": TABLE[:, :1]}, ValueError, r"last axes \(2, 4\)"),
    ("table of half", {"table": TABLE.half()}, TypeError, "table must be float32 or"),
    ("table elsewhere", {"table": TABLE.to("meta")}, ValueError, "table must be on"),
    ("ids missing", {"token_ids": None}, TypeError, "token_ids must be an int64 or int32"),
    ("ids as list", {"token_ids": IDS.tolist()}, TypeError, "token_ids must be an int64 or"),
    ("ids of floats", {"token_ids": IDS.float()}, TypeError, "must be int64 or int32"),
    ("ids of bytes", {"token_ids": IDS.byte()}, TypeError, "must be int64 or int32"),
    ("ids of rank 1", {"token_ids": IDS[0]}, ValueError, "token_ids must be"),
    ("ids too few", {"token_ids": IDS[:, :2]}, ValueError, r"token_ids must be \(2, 3\)"),
    ("ids elsewhere", {"token_ids": IDS.to("meta")}, ValueError, "token_ids must be on"),
    ("an id too high", {"token_ids": IDS + 1}, ValueError, r"lie in \[0, 5\).*got 5"),
    ("an id below 0", {"token_ids": IDS - 1}, ValueError, r"lie in \[0, 5\).*got -1"),
    ("an empty table", {"table": TABLE[:0]}, ValueError, r"lie in \[0, 0\)"),
    ("gate missing", {"gate": None}, TypeError, "gate must be a number"),
    ("gate per head, bare", {"gate": torch.ones(2)}, ValueError, r"has shape \(2, 1\)"),
    ("gate that enlarges", {"gate": torch.ones(9, 1, 1, 1, 1)}, ValueError, "gate must be"),
    ("sparse_grad", {"sparse_grad": 1}, TypeError, "sparse_grad must be True or False"),
]


@by_name("changed", "error", "says", table=BAD_EMBEDDINGS)
def test_embedding(changed: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments = {"v": V, "table": TABLE, "token_ids": IDS, "gate": 0.5, **changed}
    with pytest.raises(error, match=says):
        mix_value_embedding(**arguments)


@pytest.mark.parametrize("backend", ["cuda", "", None], ids=str)
def test_unknown_backend(backend: Any) -> None:
    with pytest.raises(ValueError, match="'auto' or one of 'native', 'triton', 'reference'"):
        mix_values([V], [1.0], backend=backend)
