"""Tables of the support matrix for `info --matrix`, README.md and docs/support.md.

The reference serves every call in every dtype and has no column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from resformer_kernels.bench.tables import markdown, pivot
from resformer_kernels.cli.support import Answer

SHORT = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float64": "f64",
    "complex64": "c64",
}
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
_REFERENCE = "reference"

Column = tuple[str, str]
"""(backend, device)."""


@dataclass(frozen=True)
class Matrix:
    """Dtypes of one op that each backend serves, for each form of a call."""

    op: str
    features: tuple[str, ...]
    columns: tuple[Column, ...]
    """Columns that serve at least one form."""
    served: dict[tuple[str, Column], tuple[str, ...]]
    """Dtypes by feature and column."""

    def dtypes(self, column: Column) -> tuple[str, ...]:
        """Dtypes that a backend serves in at least one form."""
        found = {
            dtype for feature in self.features for dtype in self.served.get((feature, column), ())
        }
        return tuple(dtype for dtype in SHORT if dtype in found)

    def refused(self, column: Column) -> tuple[str, ...]:
        """Forms that a backend does not serve, with the dtypes unless it serves none."""
        dtypes, found = self.dtypes(column), []
        for feature in self.features:
            missing = [d for d in dtypes if d not in self.served[feature, column]]
            if len(missing) == len(dtypes):
                found.append(feature)
            elif missing:
                found.append(f"{feature} ({', '.join(missing)})")
        return tuple(found)


def matrices(answers: Iterable[Answer]) -> list[Matrix]:
    """The answers by op."""
    grouped: dict[str, dict[tuple[str, Column], list[str]]] = {}
    for answer in answers:
        if answer.backend == _REFERENCE:
            continue
        column = (answer.backend, answer.device)
        cell = grouped.setdefault(answer.op, {}).setdefault((answer.feature, column), [])
        if answer.reason is None:
            cell.append(answer.dtype)
    found = []
    for op, cells in grouped.items():
        columns = dict.fromkeys(column for (_, column), dtypes in cells.items() if dtypes)
        ordered = sorted(columns, key=lambda column: column[1] != "cpu")
        served = {key: tuple(d for d in SHORT if d in dtypes) for key, dtypes in cells.items()}
        features = tuple(dict.fromkeys(feature for feature, _ in cells))
        found.append(Matrix(op, features, tuple(ordered), served))
    return found


def summary(found: Sequence[Matrix]) -> str:
    """Markdown: a row for each op, a column for each backend and device."""
    columns = dict.fromkeys(column for matrix in found for column in matrix.columns)
    cells = [
        ((f"`{matrix.op}`",), _heading(column), _served(matrix, column))
        for matrix in found
        for column in sorted(columns, key=lambda column: column[1] != "cpu")
    ]
    return markdown(pivot(("op",), cells))


def _served(matrix: Matrix, column: Column) -> str:
    dtypes = " ".join(SHORT[dtype] for dtype in matrix.dtypes(column))
    refused = ", ".join(matrix.refused(column)) if dtypes else ""
    return f"{dtypes}; not: {refused}" if refused else dtypes or "no"


def whole(found: Sequence[Matrix]) -> str:
    """Markdown: a table for each op, a row for each form of a call."""
    return "\n\n".join(f"## {matrix.op}\n\n{markdown(_table(matrix))}" for matrix in found)


def print_tables(found: Sequence[Matrix], console: Console) -> None:
    """The same in the terminal."""
    for matrix in found:
        console.print(_table(matrix))
    names = ", ".join(f"{short} {name}" for name, short in SHORT.items())
    console.print(
        f"{names}; gradients included. The reference serves every form on any device, in float64 "
        "too. What this machine lacks counts as present; without --matrix, info says what it lacks."
    )


def _table(matrix: Matrix) -> Table:
    cells = (
        (
            (feature,),
            _heading(column),
            " ".join(SHORT[dtype] for dtype in matrix.served[feature, column]) or "[yellow]no",
        )
        for feature in matrix.features
        for column in matrix.columns
    )
    return pivot(("form",), cells, title=matrix.op)


def _heading(column: Column) -> str:
    backend, device = column
    return f"{backend}, {_DEVICES[device]}"
