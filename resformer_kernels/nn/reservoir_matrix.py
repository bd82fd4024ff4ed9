"""The recurrent matrix W of a reservoir as buffers of a module."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.nn.state import AdaptsCheckpoint
from resformer_kernels.reservoir.record import RingWeight

_CSR = ("_rows", "_columns", "_values")


class HoldsMatrix(AdaptsCheckpoint):
    """A module that holds W, in one of the forms that `reservoir_scan` takes.

    `layout` "csr" keeps only its nonzero entries, whose number checkpoints may change.
    """

    units: int
    topology: str
    layout: str
    _values: Tensor
    _rows: Tensor
    _columns: Tensor

    def _register_weight(self, drawn: Tensor) -> None:
        if self.layout == "csr":
            rows, columns, drawn = csr_parts(drawn)
            self.register_buffer("_rows", rows)
            self.register_buffer("_columns", columns)
        self.register_buffer("_values", drawn.to(torch.get_default_dtype()))

    @property
    def weight(self) -> Tensor | RingWeight:
        """W: (N, N), (groups, n, n), (N,), a CSR tensor, or a `RingWeight`."""
        return self._weight_of(self._values)

    def _weight_of(self, values: Tensor) -> Tensor | RingWeight:
        if self.topology == "ring":
            return RingWeight(values)
        if self.layout == "csr":
            return csr_matrix(self._rows, self._columns, values)
        return values

    def dense_weight(self) -> Tensor:
        """W as a dense (N, N) tensor."""
        weight = self.weight
        if isinstance(weight, RingWeight):
            return torch.diag(weight.values).roll(-1, 1)
        if weight.layout is torch.sparse_csr:
            return weight.to_dense()
        if weight.dim() == 1:
            return torch.diag(weight)
        return torch.block_diag(*weight) if weight.dim() == 3 else weight

    @property
    def state_dtype(self) -> torch.dtype:
        """The state's dtype: float64 for weights in float64, float32 for all others."""
        return torch.promote_types(self._values.dtype, torch.float32)

    def adapt_checkpoint(self, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Make room for a CSR weight with another number of entries, or refuse one that is none."""
        if self.layout != "csr":
            return
        found = {name: state[prefix + name] for name in _CSR if prefix + name in state}
        if not found:
            return
        try:
            tensors = [name for name, part in found.items() if isinstance(part, Tensor)]
            if len(tensors) < len(_CSR):
                raise ValueError(f"it holds tensors {', '.join(tensors)} of {', '.join(_CSR)}")
            matrix = csr_matrix(*found.values(), check=not found["_values"].is_meta)
            if matrix.shape[0] != self.units:
                raise ValueError(f"its W has {matrix.shape[0]} units, this reservoir {self.units}")
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            errors.append(f"the checkpoint's CSR weight under {prefix!r} does not fit: {error}")
            # Parts that do not fit together would be read out of bounds.
            state.update({prefix + name: getattr(self, name) for name in found})
            return
        for name, part in found.items():
            buffer = getattr(self, name)
            if buffer.shape != part.shape:
                setattr(self, name, buffer.new_empty(part.shape))


def as_taken(weight: Tensor) -> Tensor:
    """A weight in a dtype that `reservoir_scan` takes: float16 is widened."""
    return weight.float() if weight.dtype is torch.float16 else weight


def csr_parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, values) of the nonzero entries of a dense (N, N)."""
    nonzero = weight != 0
    rows = torch.cat((torch.zeros(1, dtype=torch.int64), nonzero.sum(1).cumsum(0)))
    return rows, nonzero.nonzero()[:, 1].contiguous(), weight[nonzero]


def csr_matrix(rows: Tensor, columns: Tensor, values: Tensor, *, check: bool = False) -> Tensor:
    """The sparse CSR tensor (N, N) of these parts; with `check`, an error if they are none."""
    size = (len(rows) - 1,) * 2
    with warnings.catch_warnings():
        # torch warns once per process that its CSR tensors are in beta.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows, columns, values, size=size, check_invariants=check)
