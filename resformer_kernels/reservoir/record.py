"""The records of the reservoir's ops, and the checks of `reservoir_scan` that lead to them.

Checks read metadata alone, except the few numbers in `cu_seqlens` and in the indices of a weight,
where they lie in host memory.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.checks import (
    DTYPES,
    alone,
    check_cu_seqlens,
    check_dense,
    check_flag,
    check_tensor,
    describe,
    readable,
    real,
)
from resformer_kernels._core.dtensors import is_dtensor
from resformer_kernels._core.op import refuse_vmap

NAME = "reservoir_scan"

# Ops take an activation and a mode as its place in these tuples: C++ reads no strings.
ACTIVATIONS = ("tanh", "relu", "identity", "sigmoid", "softplus", "softmax")
TANH, RELU, IDENTITY, SIGMOID, SOFTPLUS, SOFTMAX = range(6)
UNBOUNDED = ("relu", "identity", "softplus")
"""Activations that bound the state for no weights."""
MODES = ("auto", "sequential", "chunked")
AUTO, SEQUENTIAL, CHUNKED = range(3)
REDUCTIONS = ("none", "last", "mean", "gram")
TOLERANCE = 3e-6
"""What `tolerance=None` stands for."""


class RingWeight(NamedTuple):
    """A weight with one entry a row: unit i receives `values[i] * h[source[i]]`.

    `source` is a permutation of the units, int64 or int32, (N,); None stands for the simple cycle,
    in which unit i receives from unit i - 1 and unit 0 from the last.
    """

    values: Tensor
    source: Tensor | None = None


class ReservoirInfo(NamedTuple):
    """What a scan did, each a tensor of one element, so that a compiled graph can return it."""

    chunks: Tensor
    """int64: pieces that time was split into; the number of sequences where it was sequential."""
    sweeps: Tensor
    """int64: passes over the chunks, the first included."""
    mismatch: Tensor
    """float64: the largest difference left between a chunk's start and its neighbour's end."""
    work: Tensor
    """float64: steps computed, as a multiple of the steps given."""
    forgot: Tensor
    """bool: False where a chunk did not forget its start, or differences grew again on the way:
    chunks then ran one by one, and the states have the bits of the sequential mode."""


def info_of_no_steps(like: Tensor) -> Tensor:
    """What ops return as info where nothing is computed: float64, in the order of the fields."""
    # By kernels: a tensor made of a list would have the host wait for a GPU.
    return torch.stack([like.new_full((), x, dtype=torch.float64) for x in (0, 0, 0, 1, 1)])


class ReservoirCall(NamedTuple):
    """A validated call, its fields in the order of the op's arguments; one form per meaning.

    inputs (B, T, n_in), or packed (total, n_in) with cu_seqlens; n_in = N where input_weight is
    None. The weight is dense (N, N), groups (G, n, n), or entries (N,): with `columns` alone those
    of a permutation, with `rows` (N + 1) and `columns` those of a CSR matrix, else a diagonal.
    leak () or (N,). The state's dtype is that of inputs, leak, bias, initial_state.
    """

    inputs: Tensor
    weight: Tensor
    rows: Tensor | None
    columns: Tensor | None
    input_weight: Tensor | None
    leak: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    activation: int
    mode: int
    tolerance: float
    cu_seqlens: Tensor | None

    @property
    def units(self) -> int:
        """N."""
        weight = self.weight
        if self.rows is not None:
            return self.rows.shape[0] - 1
        return weight.shape[0] * weight.shape[1] if weight.dim() == 3 else weight.shape[0]

    @property
    def sequences(self) -> int:
        """Number of initial and of final states."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.shape[0] - 1
        return self.inputs.shape[0]

    def start(self) -> Tensor:
        """The initial states, (sequences, N): zeros where none are given."""
        if self.initial_state is not None:
            return self.initial_state
        return self.inputs.new_zeros((self.sequences, self.units))

    def row_of(self) -> Tensor:
        """The row of each entry of a CSR weight."""
        assert self.rows is not None
        units = torch.arange(self.units, device=self.rows.device)
        # The number of entries is known: counting them would have the host wait for a GPU.
        return units.repeat_interleave(self.rows.diff(), output_size=self.weight.shape[0])


def couples_units(call: ReservoirCall) -> str | None:
    """Why kernels that finish a step tile by tile of units cannot serve this call."""
    if call.activation != SOFTMAX:
        return None
    return "softmax couples the units of a step, which its kernels finish some at a time"


class ReducedCall(NamedTuple):
    """The whole of a public call: the recurrence, and what becomes of its states."""

    scan: ReservoirCall
    reduce: str
    targets: Tensor | None


class BackwardCall(NamedTuple):
    """`grad_mask`: bit i is set where leaf i of `op.LEAVES` wants a gradient."""

    grad_states: Tensor | None
    grad_final: Tensor | None
    scan: ReservoirCall
    states: Tensor
    grad_mask: int


class AdjointCall(NamedTuple):
    """adjoint_t = grad_t + (1 - leak) adjoint_{t+1} + Wᵀ (slope_{t+1} adjoint_{t+1}).

    grad and slope (B, T, N) or (total, N), slope contiguous. `tolerance` is one float64 on grad's
    device, in grad's units.
    """

    grad: Tensor
    slope: Tensor
    weight: Tensor
    rows: Tensor | None
    columns: Tensor | None
    leak: Tensor
    mode: int
    tolerance: Tensor
    cu_seqlens: Tensor | None


def check_call(
    inputs: Any,
    weight: Any,
    input_weight: Any,
    leak: Any,
    bias: Any,
    initial_state: Any,
    activation: Any,
    mode: Any,
    tolerance: Any,
    cu_seqlens: Any,
    reduce: Any,
    targets: Any,
    return_info: Any,
) -> ReducedCall:
    """Check and normalise the arguments of `reservoir_scan`."""
    packed = cu_seqlens is not None
    axes = "(total_steps, inputs)" if packed else "(batch, time, inputs)"
    check_tensor("inputs", inputs, 2 if packed else 3, axes)
    weights = weight if isinstance(weight, RingWeight) else (weight,)
    refuse_vmap(NAME, (inputs, *weights, input_weight, leak, bias, initial_state, targets))
    if inputs.dtype not in DTYPES:
        raise TypeError(f"inputs must be float32, bfloat16, float16 or float64, got {inputs.dtype}")
    dtype = torch.float64 if inputs.dtype is torch.float64 else torch.float32
    inputs = inputs.to(dtype)
    values, rows, columns, units = _check_weight(weight, inputs)
    input_weight = _check_projection(input_weight, inputs, units)
    if packed:
        check_cu_seqlens(cu_seqlens, "inputs", inputs, "inputs' {} steps")
    sequences = cu_seqlens.shape[0] - 1 if packed else inputs.shape[0]
    states = (sequences, units)
    bias = _check_vector("bias", bias, (units,), "one entry a unit", inputs)
    initial_state = _check_vector(
        "initial_state", initial_state, states, "a state a sequence", inputs
    )
    for name, value, choices in (
        ("activation", activation, ACTIVATIONS),
        ("mode", mode, MODES),
        ("reduce", reduce, REDUCTIONS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {describe(value)}")
    check_flag("return_info", return_info)
    _check_targets(targets, reduce, inputs)
    scan = ReservoirCall(
        inputs=inputs,
        weight=values,
        rows=rows,
        columns=columns,
        input_weight=input_weight,
        leak=_check_leak(leak, inputs, units),
        bias=bias,
        initial_state=initial_state,
        activation=ACTIVATIONS.index(activation),
        mode=MODES.index(mode),
        tolerance=_check_tolerance(tolerance),
        cu_seqlens=cu_seqlens,
    )
    return ReducedCall(scan, reduce, targets)


def _check_weight(weight: Any, inputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """(values, rows, columns, units)."""
    axes = (
        "(N, N), (groups, n, n), (N,) for a diagonal, a sparse CSR tensor (N, N), or a RingWeight"
    )
    forms = f"weight must be a tensor {axes}"
    if isinstance(weight, RingWeight):
        values, columns = _check_ring(weight, inputs)
        return values, None, columns, values.shape[0]
    if not isinstance(weight, Tensor):
        raise TypeError(f"{forms}, got {describe(weight)}")
    if weight.layout is torch.sparse_csr:
        if weight.dim() != 2 or weight.shape[0] != weight.shape[1] or weight.shape[0] < 1:
            raise ValueError(f"{forms}, got a sparse CSR tensor of shape {tuple(weight.shape)}")
        rows, columns = weight.crow_indices().long(), weight.col_indices().long()
        values = _check_matrix("weight", weight.values(), inputs)
        return values, rows, columns, weight.shape[0]
    check_dense("weight", weight, axes)
    square = weight.dim() == 1 or (weight.dim() in (2, 3) and weight.shape[-1] == weight.shape[-2])
    if not square or weight.numel() < 1:
        raise ValueError(f"{forms}, got {describe(weight)}")
    weight = _check_matrix("weight", weight, inputs)
    units = weight.shape[0] * (weight.shape[1] if weight.dim() == 3 else 1)
    return weight, None, None, units


def _check_ring(weight: RingWeight, inputs: Tensor) -> tuple[Tensor, Tensor]:
    values, source = weight
    check_tensor("weight.values", values, 1, "(N,)")
    if values.shape[0] < 1:
        raise ValueError("weight.values must have at least one unit, got none")
    values = _check_matrix("weight.values", values, inputs)
    units = values.shape[0]
    if source is None:
        if is_dtensor(type(values)):
            # Made of `values`, the sources are on their mesh.
            return values, (values.new_ones((units,), dtype=torch.int64).cumsum(0) - 2) % units
        return values, torch.arange(-1, units - 1, device=values.device) % units
    check_tensor("weight.source", source, 1, "(N,), a permutation of the units")
    if source.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"weight.source must be int64 or int32, got {source.dtype}")
    if source.shape != values.shape:
        raise ValueError(f"weight.source must be ({units},), got shape {tuple(source.shape)}")
    if source.device != values.device:
        raise ValueError(f"weight.source must be on {values.device}, got {source.device}")
    source = source.long()
    if readable(source):
        found = torch.sort(source).values
        if not torch.equal(found, torch.arange(units, device=source.device)):
            raise ValueError(f"weight.source must be a permutation of 0..{units - 1}")
    return values, source


def _check_matrix(name: str, weight: Tensor, inputs: Tensor) -> Tensor:
    # Kernels of a float32 state read bfloat16 as it is.
    read = inputs.dtype is torch.float32 and weight.dtype is torch.bfloat16
    weight = weight if read else _widened(name, weight, inputs)
    if weight.device != inputs.device:
        raise ValueError(f"{name} must be on inputs' device {inputs.device}, got {weight.device}")
    return weight


def _widened(name: str, x: Tensor, inputs: Tensor) -> Tensor:
    """x in the state's dtype, which is exact for one of 16 bits; TypeError for any other."""
    state = inputs.dtype
    if x.dtype not in (state, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} must have the state's dtype {state}, or bfloat16 or float16, got {x.dtype}"
        )
    return x.to(state)


def _check_projection(input_weight: Any, inputs: Tensor, units: int) -> Tensor | None:
    if input_weight is None:
        if inputs.shape[-1] != units:
            raise ValueError(
                f"inputs must have weight's {units} units on the last axis, or input_weight must "
                f"be given, got inputs of shape {tuple(inputs.shape)}"
            )
        return None
    check_tensor("input_weight", input_weight, 2, "(N, inputs)")
    assert isinstance(input_weight, Tensor)
    if inputs.shape[-1] < 1:
        raise ValueError(
            f"inputs must have at least one entry on the last axis, got {describe(inputs)}"
        )
    expected = (units, inputs.shape[-1])
    if tuple(input_weight.shape) != expected:
        raise ValueError(
            f"input_weight must be {expected}: weight's units, and the last axis of inputs; "
            f"got shape {tuple(input_weight.shape)}"
        )
    return _check_matrix("input_weight", input_weight, inputs)


def _check_vector(
    name: str, value: Any, shape: tuple[int, ...], meaning: str, inputs: Tensor
) -> Any:
    """The vector in the state's dtype, or None."""
    if value is None:
        return None
    check_tensor(name, value, len(shape), f"{shape}, {meaning}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {shape}, {meaning}, got shape {tuple(value.shape)}")
    if value.device != inputs.device:
        raise ValueError(f"{name} must be on inputs' device {inputs.device}, got {value.device}")
    return _widened(name, value, inputs)


def _check_leak(leak: Any, inputs: Tensor, units: int) -> Tensor:
    if not isinstance(leak, Tensor) and not alone(leak) and hasattr(leak, "__array__"):
        leak = torch.as_tensor(leak, dtype=inputs.dtype, device=inputs.device)
    if isinstance(leak, Tensor):
        check_dense("leak", leak)
        if tuple(leak.shape) not in ((), (units,)):
            raise ValueError(f"leak must be a number, () or ({units},), got {describe(leak)}")
        wide: Tensor = _check_vector("leak", leak, tuple(leak.shape), "one entry a unit", inputs)
        return wide
    leak = real("leak", leak)
    if not 0 <= leak <= 1:
        raise ValueError(f"leak must lie in [0, 1], got {leak}")
    # A tensor: a float in a compiled graph would compile it again for every value.
    return inputs.new_ones(()) * leak


def _check_tolerance(tolerance: Any) -> float:
    if tolerance is None:
        return TOLERANCE
    tolerance = real("tolerance", tolerance)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be 0 or a positive finite number, got {tolerance}")
    return float(tolerance)


def _check_targets(targets: Any, reduce: str, inputs: Tensor) -> None:
    if targets is None:
        return
    if reduce != "gram":
        raise ValueError(f"targets are for reduce='gram', got reduce={reduce!r}")
    steps = tuple(inputs.shape[:-1])
    check_tensor("targets", targets, inputs.dim(), f"{(*steps, 'outputs')}")
    if tuple(targets.shape[:-1]) != steps:
        raise ValueError(
            f"targets must have inputs' steps {steps}, got shape {tuple(targets.shape)}"
        )
    if targets.dtype not in DTYPES:
        raise TypeError(
            f"targets must be float32, bfloat16, float16 or float64, got {targets.dtype}"
        )
    if targets.device != inputs.device:
        raise ValueError(f"targets must be on inputs' device {inputs.device}, got {targets.device}")
