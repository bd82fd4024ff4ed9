"""The backward around the compiled adjoint recurrence (see `autograd.py` for λ).

With z computed again by one matrix product, f' from it, and e_t = a f'(z_t) λ_t:

    dW = Σ e_t h_{t-1}ᵀ    dW_in = Σ e_t u_tᵀ    db = Σ e_t    da = Σ λ_t (f(z_t) - h_{t-1})
    du_t = W_inᵀ e_t       dh_0 = (1 - a) λ_1 + Wᵀ e_1

A batch goes back stretch by stretch of time, handing λ on, so that beside the gradients themselves
nothing grows with time; packed sequences go at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels.reservoir.op import ADJOINT
from resformer_kernels.reservoir.reduction import segment_sums
from resformer_kernels.reservoir.stretches import leak_units, stretch_length


class Scan(NamedTuple):
    """The arguments of the forward op."""

    inputs: Tensor
    weight: Tensor
    rows: Tensor | None
    columns: Tensor | None
    input_weight: Tensor | None
    leak: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    activation: int
    mode: int
    tolerance: float


def backward(
    namespace: str, grad_states: Tensor | None, grad_final: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    """The op `reservoir_scan_backward`: gradients of the six leaves, empty where not wanted, by the
    adjoint of `namespace`."""
    *call, states, grad_mask = arguments
    scan = Scan(*call)
    found = _Gradients(namespace, scan, grad_mask)
    if grad_states is None:
        grad_states = torch.zeros_like(states)
    if scan.cu_seqlens is not None:
        found.initial = _packed(scan, grad_states, grad_final, states, found)
    else:
        found.initial = _batch(scan, grad_states, grad_final, states, found)
    return found.leaves()


def _batch(
    scan: Scan, grad: Tensor, carry: Tensor | None, states: Tensor, found: _Gradients
) -> Tensor:
    """Adds to `found` and returns the initial states' gradient."""
    batch, steps, units = states.shape
    carry = states.new_zeros((batch, units)) if carry is None else carry
    length = stretch_length(batch * units, states.device)
    for begin in reversed(range(0, steps, length)):
        end = min(steps, begin + length)
        before = _start(scan, states) if begin == 0 else states[:, begin - 1]
        previous = torch.cat([before[:, None], states[:, begin : end - 1]], dim=1)
        given = grad[:, begin:end].clone(memory_format=torch.contiguous_format)
        given[:, -1] += carry
        piece = scan._replace(inputs=scan.inputs[:, begin:end])
        adjoint, e = found.add(piece, previous, given, slice(begin, end))
        carry = _one_step_back(scan, adjoint[:, 0], e[:, 0])
    return carry


def _packed(
    scan: Scan, grad: Tensor, grad_final: Tensor | None, states: Tensor, found: _Gradients
) -> Tensor:
    offsets = scan.cu_seqlens
    assert offsets is not None
    start = _start(scan, states)
    gradient = torch.zeros_like(start) if grad_final is None else grad_final.clone()
    total = int(offsets[-1])
    if total == 0:
        return gradient
    used = offsets.diff() > 0
    firsts, lasts = offsets[:-1][used].long(), offsets[1:][used].long() - 1
    previous = torch.cat([states[:1], states[: total - 1]])
    previous[firsts] = start[used]
    given = grad[:total].clone(memory_format=torch.contiguous_format)
    given.index_add_(0, lasts, gradient[used])
    adjoint, e = found.add(
        scan._replace(inputs=scan.inputs[:total]), previous, given, slice(0, total)
    )
    gradient[used] = _one_step_back(scan, adjoint[firsts], e[firsts])
    return gradient


def _start(scan: Scan, states: Tensor) -> Tensor:
    if scan.initial_state is not None:
        return scan.initial_state
    sequences = states.shape[0] if scan.cu_seqlens is None else scan.cu_seqlens.shape[0] - 1
    return states.new_zeros((sequences, states.shape[-1]))


def _one_step_back(scan: Scan, adjoint: Tensor, e: Tensor) -> Tensor:
    return (1 - scan.leak) * adjoint + _transposed_product(scan, e)


def _sparse(scan: Scan) -> Tensor:
    assert scan.rows is not None
    assert scan.columns is not None
    units = scan.rows.shape[0] - 1
    return torch.sparse_csr_tensor(
        scan.rows, scan.columns, scan.weight.float(), (units, units), check_invariants=False
    )


def _product(scan: Scan, h: Tensor) -> Tensor:
    """W h, for h (..., N)."""
    weight = scan.weight.float()
    if scan.rows is not None:
        return (_sparse(scan) @ h.flatten(0, -2).T).T.unflatten(0, h.shape[:-1])
    if scan.columns is not None:
        return h.index_select(-1, scan.columns) * weight
    if weight.dim() == 1:
        return h * weight
    if weight.dim() == 2:
        return h @ weight.T
    parts = h.unflatten(-1, weight.shape[:2]).flatten(0, -3).transpose(0, 1)
    return (parts @ weight.mT).transpose(0, 1).reshape(h.shape)


def _row_of(scan: Scan, units: int) -> Tensor:
    """The row of each entry of a CSR weight."""
    assert scan.rows is not None
    every = torch.arange(units, device=scan.rows.device)
    # The number of entries is known: counting them would have the host wait for a GPU.
    return torch.repeat_interleave(every, scan.rows.diff(), output_size=scan.weight.shape[0])


def _transposed_product(scan: Scan, e: Tensor) -> Tensor:
    """Wᵀ e, for e (rows, N)."""
    weight = scan.weight.float()
    if scan.rows is not None:
        assert scan.columns is not None
        units = e.shape[-1]
        row_of = _row_of(scan, units)
        terms = e.index_select(-1, row_of) * weight
        # Column by column: `index_add` would add in any order on a GPU.
        order = scan.columns.argsort(stable=True)
        every = torch.arange(units + 1, device=e.device, dtype=scan.columns.dtype)
        offsets = torch.searchsorted(scan.columns[order], every)
        return segment_sums(terms.T[order], offsets).T.contiguous()
    if scan.columns is not None:
        return torch.zeros_like(e).index_copy_(-1, scan.columns, e * weight)
    if weight.dim() == 1:
        return e * weight
    if weight.dim() == 2:
        return e @ weight
    return torch.einsum("gij,rgi->rgj", weight, e.unflatten(-1, weight.shape[:2])).flatten(1)


def _activation(scan: Scan, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """(f(z), f'(z)); None where the slope is 1 everywhere."""
    if scan.activation == 0:
        f = torch.tanh_(z)
        return f, 1 - f * f
    if scan.activation == 1:
        return torch.relu(z), (z > 0).to(z.dtype)
    return z, None


class _Gradients:
    """Sums over time of every gradient that is wanted, in float64 where they are vectors."""

    def __init__(self, namespace: str, scan: Scan, grad_mask: int) -> None:
        self.adjoint = getattr(getattr(torch.ops, namespace), ADJOINT).default
        self.scan = scan
        self.wanted = [bool(grad_mask >> bit & 1) for bit in range(6)]
        self.units = leak_units(scan.weight, scan.rows)

        def zeros(*shape: int) -> Tensor:
            return scan.inputs.new_zeros(shape, dtype=torch.float64)

        self.inputs = torch.zeros_like(scan.inputs) if self.wanted[0] else None
        self.weight = zeros(*scan.weight.shape) if self.wanted[1] else None
        projection = scan.input_weight
        self.projection = (
            zeros(*projection.shape) if projection is not None and self.wanted[2] else None
        )
        self.leak = zeros(self.units) if self.wanted[3] else None
        self.bias = zeros(self.units) if self.wanted[4] else None
        self.initial: Tensor | None = None

    def add(
        self, scan: Scan, previous: Tensor, given: Tensor, steps: slice
    ) -> tuple[Tensor, Tensor]:
        """Goes back over one stretch: (λ, e)."""
        z = _product(scan, previous)
        projection = None if scan.input_weight is None else scan.input_weight.float()
        z += scan.inputs if projection is None else scan.inputs @ projection.T
        if scan.bias is not None:
            z += scan.bias
        f, derivative = _activation(scan, z)
        slope = scan.leak.expand(f.shape) if derivative is None else derivative.mul_(scan.leak)
        # λ has the gradient's units, so a tolerance in them.
        tolerance = scan.tolerance * float(given.abs().amax()) if given.numel() else 0.0
        offsets = None if scan.cu_seqlens is None else scan.cu_seqlens
        adjoint, _info = self.adjoint(
            given,
            slope.contiguous(),
            scan.weight,
            scan.rows,
            scan.columns,
            scan.leak,
            offsets,
            scan.mode,
            tolerance,
        )
        e = slope * adjoint
        flat, past = e.flatten(0, -2), previous.flatten(0, -2)
        if self.inputs is not None:
            target = self.inputs[steps] if scan.cu_seqlens is not None else self.inputs[:, steps]
            target.copy_(e if projection is None else e @ projection)
        if self.weight is not None:
            self._add_weight(flat, past)
        if self.projection is not None:
            self.projection += flat.T @ scan.inputs.flatten(0, -2)
        if self.leak is not None:
            self.leak += (adjoint * (f - previous)).flatten(0, -2).sum(0, dtype=torch.float64)
        if self.bias is not None:
            self.bias += flat.sum(0, dtype=torch.float64)
        return adjoint, e

    def _add_weight(self, e: Tensor, previous: Tensor) -> None:
        assert self.weight is not None
        scan = self.scan
        if scan.rows is not None and scan.columns is not None:
            row_of = torch.repeat_interleave(
                torch.arange(self.units, device=e.device), scan.rows.diff()
            )
            self.weight += (e.T @ previous)[row_of, scan.columns]
        elif self.weight.dim() == 1:
            past = previous if scan.columns is None else previous.index_select(-1, scan.columns)
            self.weight += (e * past).sum(0, dtype=torch.float64)
        elif self.weight.dim() == 2:
            self.weight += e.T @ previous
        else:
            groups = self.weight.shape[0]
            left, right = (x.unflatten(-1, (groups, -1)).transpose(0, 1) for x in (e, previous))
            self.weight += left.mT @ right

    def leaves(self) -> tuple[Tensor, ...]:
        """In the order of the op's results; empty where not wanted."""
        scan = self.scan
        leak = self.leak
        if leak is not None and scan.leak.dim() == 0:
            leak = leak.sum()
        found = (self.inputs, self.weight, self.projection, leak, self.bias, self.initial)
        matrices, vectors = (scan.weight, scan.input_weight), (scan.leak, scan.bias)
        like = (scan.inputs, *matrices, *vectors, scan.initial_state)
        return tuple(
            scan.inputs.new_empty((0,))
            if gradient is None or leaf is None or not wanted
            else gradient.to(leaf.dtype)
            for gradient, leaf, wanted in zip(found, like, self.wanted, strict=True)
        )
