"""The recurrent matrix W of a reservoir as buffers of a module."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.nn.reservoir_weights import spectral_radius
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
    leak: Tensor
    _values: Tensor
    _rows: Tensor
    _columns: Tensor
    _source: Tensor | None

    def _register_weight(self, weight: Tensor | RingWeight, dtype: torch.dtype) -> None:
        values, source = weight if isinstance(weight, RingWeight) else (weight, None)
        if self.layout == "csr":
            rows, columns, values = csr_parts(values)
            self.register_buffer("_rows", rows)
            self.register_buffer("_columns", columns)
        self.register_buffer("_source", source)
        self.register_buffer("_values", values.to(dtype))

    @property
    def weight(self) -> Tensor | RingWeight:
        """W: (N, N), (groups, n, n), (N,), a CSR tensor, or a `RingWeight`."""
        return self._weight_of(self._values)

    def _weight_of(self, values: Tensor) -> Tensor | RingWeight:
        if self.topology == "ring":
            return RingWeight(values, self._source)
        if self.layout == "csr":
            return csr_matrix(self._rows, self._columns, values)
        return values

    def dense_weight(self) -> Tensor:
        """W as a dense (N, N) tensor."""
        weight = self.weight
        if isinstance(weight, RingWeight):
            return ring_matrix(weight).to_dense()
        if weight.layout is torch.sparse_csr:
            return weight.to_dense()
        if weight.dim() == 1:
            return torch.diag(weight)
        return torch.block_diag(*weight) if weight.dim() == 3 else weight

    def step_matrices(self) -> list[Tensor]:
        """(1-a)I + aW, the step where f has slope 1, as tanh has at 0, and which no activation
        exceeds: float64, (n, n), one per group."""
        grouped = self._values.dim() == 3
        blocks = self._values if grouped else self.dense_weight()[None]
        leaks = self.leak.double().expand(self.units).view(len(blocks), -1)
        pairs = zip(blocks.double(), leaks, strict=True)
        return [torch.diag(1 - a) + a[:, None] * block for block, a in pairs]

    def _step_radius(self) -> float:
        """The spectral radius of (1-a)I + aW; a CSR weight stays sparse."""
        if self.layout != "csr":
            return max(spectral_radius(step) for step in self.step_matrices())
        units, leak = torch.arange(self.units), self.leak.double().expand(self.units)
        rows = units.repeat_interleave(self._rows.diff())
        places = torch.stack((torch.cat((units, rows)), torch.cat((units, self._columns))))
        values = torch.cat((1 - leak, leak[rows] * self._values))
        return spectral_radius(coo_matrix(places, values, self.units))

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


def ring_matrix(weight: RingWeight) -> Tensor:
    """The sparse COO matrix (N, N) with W[i, source[i]] = values[i]."""
    values, source = weight
    units = torch.arange(len(values), device=values.device)
    places = torch.stack((units, units.roll(1) if source is None else source))
    return coo_matrix(places, values, len(values))


def coo_matrix(places: Tensor, values: Tensor, size: int) -> Tensor:
    """The sparse COO tensor (size, size) with values (n,) added up at places (2, n)."""
    shape = size, size
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=True).coalesce()


def csr_parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, values) of the nonzero entries of (N, N), dense or sparse COO."""
    entries = weight.to_sparse().coalesce()
    rows, columns = entries.indices()
    ends = torch.bincount(rows, minlength=len(weight)).cumsum(0)
    return torch.cat((ends.new_zeros(1), ends)), columns.contiguous(), entries.values()


def csr_matrix(rows: Tensor, columns: Tensor, values: Tensor, *, check: bool = False) -> Tensor:
    """The sparse CSR tensor (N, N) of these parts; with `check`, an error if they are none."""
    size = (len(rows) - 1,) * 2
    with warnings.catch_warnings():
        # torch warns once per process that its CSR tensors are in beta.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows, columns, values, size=size, check_invariants=check)
