"""The backward around the compiled adjoint recurrence (see `op.py` for its place).

With z computed again by one matrix product, f' from it, and e_t = a f'(z_t) λ_t:

    λ_t = dL/dh_t = G_t + (1 - a) λ_{t+1} + Wᵀ e_{t+1}
    dW = Σ e_t h_{t-1}ᵀ    dW_in = Σ e_t u_tᵀ    db = Σ e_t    da = Σ λ_t (f(z_t) - h_{t-1})
    du_t = W_inᵀ e_t       dh_0 = (1 - a) λ_1 + Wᵀ e_1

A batch goes back segment by segment of time, handing λ on, so that beside the gradients themselves
nothing grows with time; packed sequences go at once. The host waits for a GPU nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels.reservoir.op import ADJOINT, LEAVES
from resformer_kernels.reservoir.record import (
    RELU,
    SIGMOID,
    SOFTPLUS,
    TANH,
    AdjointCall,
    BackwardCall,
    ReservoirCall,
)
from resformer_kernels.reservoir.reduction import segment_sums
from resformer_kernels.reservoir.segments import segment_length


def backward(namespace: str, call: BackwardCall) -> tuple[Tensor, ...]:
    """The op `reservoir_scan_backward`: gradients of the leaves, empty where not wanted, by the
    adjoint op of `namespace`."""
    sums = _Gradients(namespace, call)
    if call.grad_states is None:
        call = call._replace(grad_states=torch.zeros_like(call.states))
    sums.found["initial_state"] = (
        _batch(call, sums) if call.scan.cu_seqlens is None else _packed(call, sums)
    )
    return sums.leaves()


def _batch(call: BackwardCall, sums: _Gradients) -> Tensor:
    """Adds to `sums`; returns the initial states' gradient."""
    grad, grad_final, scan, states, _ = call
    assert grad is not None
    batch, steps, units = states.shape
    carry = states.new_zeros((batch, units)) if grad_final is None else grad_final.clone()
    length = segment_length(batch * units, states.device)
    for begin in reversed(range(0, steps, length)):
        end = min(steps, begin + length)
        before = scan.start() if begin == 0 else states[:, begin - 1]
        previous = torch.cat([before[:, None], states[:, begin : end - 1]], dim=1)
        given = grad[:, begin:end].clone(memory_format=torch.contiguous_format)
        given[:, -1] += carry
        steps_of = (slice(None), slice(begin, end))
        adjoint, e = sums.add(scan.inputs[steps_of], previous, given, steps_of)
        carry = _one_step_back(scan, adjoint[:, 0], e[:, 0])
    return carry


def _packed(call: BackwardCall, sums: _Gradients) -> Tensor:
    """Adds to `sums`; returns the initial states' gradient."""
    grad, grad_final, scan, states, _ = call
    offsets = scan.cu_seqlens
    assert grad is not None
    assert offsets is not None
    start = scan.start()
    gradient = torch.zeros_like(start) if grad_final is None else grad_final
    rows, in_use = rows_in_use(offsets, states.shape[0])
    if rows == 0 or start.shape[0] == 0:
        return gradient.clone()
    inputs, grad = scan.inputs[:rows], grad[:rows]
    if in_use is not None:
        inputs, grad = (x.where(in_use[:, None], 0) for x in (inputs, grad))
    # Sequences without steps write into one more row, which nothing reads.
    has_steps = offsets.diff() > 0
    first = torch.where(has_steps, offsets[:-1], rows).long()
    last = torch.where(has_steps, offsets[1:] - 1, rows).long()
    previous = torch.cat([states[:1], states[:rows]])
    previous.index_copy_(0, first, start)
    given = torch.cat([grad, grad[:1]])
    given.index_add_(0, last, gradient)
    adjoint, e = sums.add(inputs, previous[:rows], given[:rows], (slice(0, rows),))
    first = first.clamp(max=rows - 1)
    back = _one_step_back(scan, adjoint[first], e[first])
    return torch.where(has_steps[:, None], back, gradient)


def host_may_read(tensor: Tensor) -> bool:
    """Whether reading a tensor's values waits for no device."""
    return tensor.device.type == "cpu"


def rows_in_use(cu_seqlens: Tensor, rows: int) -> tuple[int, Tensor | None]:
    """(how many of the packed rows a backward reads, which of these belong to a sequence).

    None: all of them. To learn where the last sequence ends, the host would have to wait for a GPU:
    there every row is read, and those after the end are masked.
    """
    if host_may_read(cu_seqlens):
        return int(cu_seqlens[-1]), None
    return rows, torch.arange(rows, device=cu_seqlens.device) < cu_seqlens[-1]


def _one_step_back(scan: ReservoirCall, adjoint: Tensor, e: Tensor) -> Tensor:
    return (1 - scan.leak) * adjoint + _transposed_product(scan, e)


def _sparse(scan: ReservoirCall, values: Tensor) -> Tensor:
    """The CSR matrix of these values on the weight's pattern."""
    assert scan.rows is not None
    assert scan.columns is not None
    shape = (scan.units, scan.units)
    return torch.sparse_csr_tensor(scan.rows, scan.columns, values, shape, check_invariants=False)


def _product(scan: ReservoirCall, h: Tensor) -> Tensor:
    """W h, for h (..., N)."""
    weight = scan.weight.float()
    if scan.rows is not None:
        return (_sparse(scan, weight) @ h.flatten(0, -2).T).T.unflatten(0, h.shape[:-1])
    if scan.columns is not None:
        return h.index_select(-1, scan.columns) * weight
    if weight.dim() == 1:
        return h * weight
    if weight.dim() == 2:
        return h @ weight.T
    parts = h.unflatten(-1, weight.shape[:2]).flatten(0, -3).transpose(0, 1)
    return (parts @ weight.mT).transpose(0, 1).reshape(h.shape)


def _transposed_product(scan: ReservoirCall, e: Tensor) -> Tensor:
    """Wᵀ e, for e (rows, N)."""
    weight = scan.weight.float()
    if scan.rows is not None:
        assert scan.columns is not None
        terms = e.index_select(-1, scan.row_of()) * weight
        # Column by column: `index_add` would add in any order on a GPU.
        order = scan.columns.argsort(stable=True)
        units = torch.arange(scan.units + 1, device=e.device)
        offsets = torch.searchsorted(scan.columns[order], units)
        return segment_sums(terms.T[order], offsets).T.contiguous()
    if scan.columns is not None:
        return torch.zeros_like(e).index_copy_(-1, scan.columns, e * weight)
    if weight.dim() == 1:
        return e * weight
    if weight.dim() == 2:
        return e @ weight
    return torch.einsum("gij,rgi->rgj", weight, e.unflatten(-1, weight.shape[:2])).flatten(1)


def _activation(activation: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """(f(z), f'(z)); None where the slope is 1 everywhere."""
    if activation == TANH:
        f = torch.tanh_(z)
        return f, 1 - f * f
    if activation == RELU:
        return torch.relu(z), (z > 0).to(z.dtype)
    if activation == SIGMOID:
        f = torch.sigmoid_(z)
        return f, f * (1 - f)
    if activation == SOFTPLUS:
        return -F.logsigmoid(-z), torch.sigmoid(z)
    return z, None


class _Gradients:
    """Sums over time of every gradient that is wanted, in float64 but for the inputs'."""

    def __init__(self, namespace: str, call: BackwardCall) -> None:
        scan = call.scan
        self.namespace, self.scan = namespace, scan
        self.wanted = [
            name
            for bit, name in enumerate(LEAVES)
            if call.grad_mask >> bit & 1 and getattr(scan, name) is not None
        ]
        self.found: dict[str, Tensor] = {}
        for name in self.wanted:
            leaf = getattr(scan, name)
            shape = (scan.units,) if name == "leak" else leaf.shape
            dtype = leaf.dtype if name == "inputs" else torch.float64
            self.found[name] = leaf.new_zeros(shape, dtype=dtype)

    def add(
        self, inputs: Tensor, previous: Tensor, given: Tensor, steps: tuple[slice, ...]
    ) -> tuple[Tensor, Tensor]:
        """Goes back over `steps`, one segment, from the states before each and the gradients given
        to each: (λ, e)."""
        scan, found = self.scan, self.found
        z = _product(scan, previous)
        projection = None if scan.input_weight is None else scan.input_weight.float()
        z += inputs if projection is None else inputs @ projection.T
        if scan.bias is not None:
            z += scan.bias
        f, derivative = _activation(scan.activation, z)
        slope = scan.leak.expand(f.shape) if derivative is None else derivative.mul_(scan.leak)
        # λ has the gradient's units, so a tolerance in them.
        largest = given.abs().amax() if given.numel() else given.new_zeros(())
        adjoint, _info = ADJOINT(
            self.namespace,
            AdjointCall(
                grad=given,
                slope=slope.contiguous(),
                weight=scan.weight,
                rows=scan.rows,
                columns=scan.columns,
                leak=scan.leak,
                mode=scan.mode,
                tolerance=largest.double() * scan.tolerance,
                cu_seqlens=scan.cu_seqlens,
            ),
        )
        e = slope * adjoint
        flat, past = e.flatten(0, -2), previous.flatten(0, -2)
        if "inputs" in found:
            found["inputs"][steps] = e if projection is None else e @ projection
        if "weight" in found:
            found["weight"] += self._weight_sum(flat, past)
        if "input_weight" in found:
            found["input_weight"] += flat.T @ inputs.flatten(0, -2)
        if "leak" in found:
            found["leak"] += (adjoint * (f - previous)).flatten(0, -2).sum(0, dtype=torch.float64)
        if "bias" in found:
            found["bias"] += flat.sum(0, dtype=torch.float64)
        return adjoint, e

    def _weight_sum(self, e: Tensor, previous: Tensor) -> Tensor:
        """Σ e_t h_{t-1}ᵀ over rows, where the weight has entries."""
        scan = self.scan
        if scan.rows is not None:
            # On the pattern alone: (N, N) would not fit into memory where W is large and sparse.
            pattern = _sparse(scan, e.new_zeros(scan.weight.shape))
            return torch.sparse.sampled_addmm(pattern, e.T, previous).values()
        if scan.weight.dim() == 1:
            past = previous if scan.columns is None else previous.index_select(-1, scan.columns)
            return (e * past).sum(0, dtype=torch.float64)
        if scan.weight.dim() == 2:
            return e.T @ previous
        groups = scan.weight.shape[0]
        left, right = (x.unflatten(-1, (groups, -1)).transpose(0, 1) for x in (e, previous))
        return left.mT @ right

    def leaves(self) -> tuple[Tensor, ...]:
        """In the order of the op's results; empty where not wanted."""
        scan, found = self.scan, self.found
        if "leak" in found and scan.leak.dim() == 0:
            found["leak"] = found["leak"].sum()
        return tuple(
            found[name].to(getattr(scan, name).dtype)
            if name in self.wanted
            else scan.inputs.new_empty((0,))
            for name in LEAVES
        )
