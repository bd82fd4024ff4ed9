"""A fixed random reservoir as a module, with ReservoirPy's argument names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from resformer_kernels._core.checks import check_flag, check_real, describe
from resformer_kernels.nn.reservoir_weights import random_groups, random_inputs, spectral_radius
from resformer_kernels.nn.ridge import Ridge
from resformer_kernels.reservoir.api import reservoir_scan
from resformer_kernels.reservoir.record import ACTIVATIONS, RingWeight

TOPOLOGIES = ("random", "ring", "diagonal")
Numbers = float | Sequence[float]


class Reservoir(nn.Module):
    """h_t = (1 - lr) h_{t-1} + lr f(W h_{t-1} + W_in u_t + b), with fixed random W, W_in and b.

    A leaky echo state network (Jaeger, 2001), the memory of Liu and Xu, arXiv 2509.24074, run by
    `reservoir_scan`. Names and distributions are ReservoirPy's: W is normal, W_in and b are
    ±scaling. They and lr are buffers: saved, moved and cast with the module, and never trained.

    Args:
        units: N, the length of the state over all groups.
        input_dim: n_in, the length of an input.
        lr: the leak a, in [0, 1]: one number, one per group, or one per unit.
        sr: the spectral radius that each group's W is scaled to: one number, or one per group.
        input_scaling: the magnitude of W_in's entries: one number, or one per input.
        rc_connectivity, input_connectivity: the fraction of nonzero entries of W and of W_in.
        bias_scaling: the magnitude of b's entries; 0: no bias.
        activation: f, "tanh", "relu" or "identity".
        seed: seeds every draw. A seed gives the same reservoir, up to rounding, on every machine.
        groups: independent reservoirs of N / groups units side by side; each gets every input.
        topology: "random"; "ring", where each unit gets the previous one's state with weight sr; or
            "diagonal", without connections between units, with weights uniform in [-sr, sr].
        layout: "dense", or "csr" to store and multiply only W's nonzero entries.
        stateful: a call continues from the last one's final state ("all-time" memory), until
            `reset`.
        mode, tolerance, backend: as in `reservoir_scan`.

    Attributes:
        weight: W as the op takes it; input_weight: (N, n_in); bias: (N,) or None; leak: () or (N,).
        state: the state of a stateful reservoir, (B, N); None at the start.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.

    Warns:
        UserWarning: the activation is unbounded and (1-a)I + aW has an eigenvalue of modulus 1 or
            more, so that states may grow without limit.
    """

    input_weight: Tensor
    bias: Tensor | None
    leak: Tensor
    _values: Tensor
    _rows: Tensor
    _columns: Tensor

    def __init__(
        self,
        units: int,
        input_dim: int,
        *,
        lr: Numbers = 1.0,
        sr: Numbers = 0.9,
        input_scaling: Numbers = 1.0,
        rc_connectivity: float = 0.1,
        input_connectivity: float = 0.1,
        bias_scaling: float = 0.0,
        activation: str = "tanh",
        seed: int = 0,
        groups: int = 1,
        topology: str = "random",
        layout: str = "dense",
        stateful: bool = False,
        mode: str = "auto",
        tolerance: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("units", units), ("input_dim", input_dim), ("groups", groups)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        if units % groups or (groups > 1 and topology != "random"):
            raise ValueError(
                f"units {units} must be a multiple of groups {groups}, and groups 1 unless "
                f"topology is 'random', got topology {topology!r}"
            )
        _check_choice("topology", topology, TOPOLOGIES)
        _check_choice("activation", activation, ACTIVATIONS)
        _check_choice("layout", layout, ("dense", "csr"))
        if layout == "csr" and (groups > 1 or topology != "random"):
            raise ValueError("layout 'csr' is for topology 'random' with groups 1")
        shares = (("rc_connectivity", rc_connectivity), ("input_connectivity", input_connectivity))
        for name, share in shares:
            check_real(name, share)
            if not 0 < share <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {share}")
        check_flag("stateful", stateful)
        self.units, self.input_dim, self.groups = units, input_dim, groups
        self.activation, self.topology, self.layout = activation, topology, layout
        self.stateful, self.mode, self.tolerance, self.backend = stateful, mode, tolerance, backend
        self.state: Tensor | None = None
        generator = torch.Generator().manual_seed(seed)
        leaks = _numbers("lr", lr, (1, groups, units))
        if not all(0 <= a <= 1 for a in leaks):
            raise ValueError(f"lr must lie in [0, 1], got {lr}")
        leak = torch.tensor(leaks, dtype=torch.float64).repeat_interleave(units // len(leaks))
        self._draw_weight(_numbers("sr", sr, (1, groups)), rc_connectivity, generator)
        scaling = torch.tensor(
            _numbers("input_scaling", input_scaling, (1, input_dim)), dtype=torch.float64
        )
        dtype = torch.get_default_dtype()
        drawn = random_inputs(units, input_dim, input_connectivity, scaling, generator)
        self.register_buffer("input_weight", drawn.to(dtype))
        check_real("bias_scaling", bias_scaling)
        signs = torch.randint(0, 2, (units,), generator=generator).to(dtype) * 2 - 1
        self.register_buffer("bias", bias_scaling * signs if bias_scaling else None)
        self.register_buffer("leak", (leak[0] if len(leaks) == 1 else leak).to(dtype))
        if activation != "tanh":
            self._warn_if_unstable()

    def _draw_weight(
        self, radii: list[float], connectivity: float, generator: torch.Generator
    ) -> None:
        dtype = torch.get_default_dtype()
        if not all(radius >= 0 for radius in radii):
            raise ValueError(f"sr must be at least 0, got {radii}")
        if self.topology == "ring":
            values = torch.full((self.units,), radii[0], dtype=torch.float64)
        elif self.topology == "diagonal":
            values = torch.rand(self.units, generator=generator, dtype=torch.float64) * 2 - 1
            values *= radii[0]
        else:
            radii = radii * (self.groups // len(radii))
            size = self.units // self.groups
            values = random_groups(self.groups, size, connectivity, radii, generator)
            values = values if self.groups > 1 else values[0]
        if self.layout == "csr":
            nonzero = values != 0
            rows = torch.cat((torch.zeros(1, dtype=torch.int64), nonzero.sum(1).cumsum(0)))
            self.register_buffer("_rows", rows)
            self.register_buffer("_columns", nonzero.nonzero()[:, 1].contiguous())
            values = values[nonzero]
        self.register_buffer("_values", values.to(dtype))

    @property
    def weight(self) -> Tensor | RingWeight:
        """W: (N, N), (groups, n, n), (N,), a CSR tensor, or a `RingWeight`."""
        values = self._values
        if self.topology == "ring":
            return RingWeight(values)
        if self.layout == "csr":
            with warnings.catch_warnings():
                # torch warns once per process that its CSR tensors are in beta.
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                size = (self.units, self.units)
                return torch.sparse_csr_tensor(
                    self._rows, self._columns, values, size=size, check_invariants=False
                )
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

    def step_matrices(self) -> list[Tensor]:
        """(1-a)I + aW, the step linearised at 0: float64, (n, n), one per group."""
        grouped = self._values.dim() == 3
        blocks = self._values if grouped else self.dense_weight()[None]
        leaks = self.leak.double().expand(self.units).view(len(blocks), -1)
        pairs = zip(blocks.double(), leaks, strict=True)
        return [torch.diag(1 - a) + a[:, None] * block for block, a in pairs]

    def _warn_if_unstable(self) -> None:
        radius = max(spectral_radius(step) for step in self.step_matrices())
        if radius >= 1:
            warnings.warn(
                f"activation {self.activation!r} is unbounded and the spectral radius of "
                f"(1-lr)I + lr W is {radius:.4g}: states may grow without limit; lower sr",
                UserWarning,
                stacklevel=3,
            )

    def forward(
        self,
        inputs: Tensor,
        initial_state: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        reduce: str = "none",
        targets: Tensor | None = None,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
        """Run over all time steps.

        Args:
            inputs: u, (B, T, n_in), packed (total_steps, n_in) with cu_seqlens.
            initial_state: h_0, (B, N) or (sequences, N); None: the stored state of a stateful
                reservoir, else zeros.
            cu_seqlens, reduce, targets: as in `reservoir_scan`.

        Returns:
            (states or their reduction, final state), as `reservoir_scan`. A stateful reservoir
            stores the final state, with its autograd graph if it has one: see `detach`.

        Raises:
            ValueError: the stored state has another batch size. Otherwise as `reservoir_scan`.
        """
        if initial_state is None and self.stateful and self.state is not None:
            initial_state = self.state
            sequences = inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            if sequences != initial_state.shape[0]:
                raise ValueError(
                    f"inputs must hold {initial_state.shape[0]} sequences, as the calls before, "
                    f"got {sequences}: call reset() to start anew"
                )
        states, final_state = reservoir_scan(
            inputs,
            self.weight,
            input_weight=self.input_weight,
            leak=self.leak,
            bias=self.bias,
            initial_state=initial_state,
            activation=self.activation,
            mode=self.mode,
            tolerance=self.tolerance,
            cu_seqlens=cu_seqlens,
            reduce=reduce,
            targets=targets,
            backend=self.backend,
        )
        if self.stateful:
            self.state = final_state
        return states, final_state

    def reset(self, sequences: Tensor | None = None) -> None:
        """Reset all batch rows (None), or those selected by a bool mask (B,) or indices."""
        if sequences is None or self.state is None:
            self.state = None
        else:
            self.state = cleared(self.state, sequences)

    def detach(self) -> None:
        """Detach the stored state from its graph, as truncated backpropagation needs."""
        if self.state is not None:
            self.state = self.state.detach()

    @torch.no_grad()
    def stream(
        self, readout: Ridge, inputs: Tensor, targets: Tensor, *, washout: int = 0
    ) -> Tensor:
        """Add the Gram sums of a series to `readout`, in memory that its length does not change.

        Args:
            readout: a `Ridge` of N inputs; call its `solve` after the last series.
            inputs: (B, T, n_in); targets: (B, T, m).
            washout: number of first steps that drive the reservoir but are not fitted to.

        Returns:
            The final state (B, N).
        """
        if not 0 <= washout <= inputs.shape[1]:
            raise ValueError(f"washout must lie in [0, {inputs.shape[1]}], got {washout}")
        _, state = self(inputs[:, :washout], reduce="last")
        fitted = targets[:, washout:].double()
        # The intercept needs the sum of the states: their product with a column of ones.
        ones = torch.cat((fitted, torch.ones_like(fitted[..., :1])), -1)
        sums, final_state = self(inputs[:, washout:], state, reduce="gram", targets=ones)
        gram, cross = sums
        readout.update_gram(
            gram,
            cross[:, :-1],
            count=fitted.shape[0] * fitted.shape[1],
            x_sum=cross[:, -1],
            y_sum=fitted.sum((0, 1)),
        )
        return final_state

    @torch.no_grad()
    def free_run(
        self, readout: Callable[[Tensor], Tensor], state: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Feed the readout's output back as the next input.

        Args:
            readout: maps a state (B, N) to the next input (B, n_in), such as a fitted `Ridge`.
            state: the start, (B, N).
            steps: number of outputs.

        Returns:
            The outputs (B, steps, n_in), the first read from `state` itself, and the last state
            (B, N). A stateful reservoir's stored state is unchanged.
        """
        stored, outputs = self.state, []
        for _ in range(steps):
            outputs.append(readout(state))
            _, state = self(outputs[-1][:, None], state, reduce="last")
        self.state = stored
        return torch.stack(outputs, 1), state

    def extra_repr(self) -> str:
        """The arguments that print shows."""
        return (
            f"units={self.units}, input_dim={self.input_dim}, activation={self.activation!r}, "
            f"groups={self.groups}, topology={self.topology!r}, stateful={self.stateful}"
        )


def cleared(state: Tensor, sequences: Tensor) -> Tensor:
    """A copy of state (B, ...) with zeros in the rows of `sequences`, bool (B,) or indices.

    Raises:
        TypeError, ValueError: sequences is neither, or out of range.
    """
    if not isinstance(sequences, Tensor) or sequences.dim() != 1:
        raise TypeError(f"sequences must be a bool mask (B,) or indices, got {describe(sequences)}")
    if sequences.dtype is torch.bool:
        if sequences.shape[0] != state.shape[0]:
            raise ValueError(f"sequences must be ({state.shape[0]},), got {describe(sequences)}")
        gone = sequences
    else:
        rows = sequences.tolist()
        if rows and not 0 <= min(rows) <= max(rows) < len(state):
            raise ValueError(
                f"sequences must lie in [0, {len(state) - 1}], got {min(rows)} to {max(rows)}"
            )
        gone = torch.zeros(state.shape[0], dtype=torch.bool, device=state.device)
        gone[sequences] = True
    return state.masked_fill(gone.view(-1, *(1,) * (state.dim() - 1)), 0)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {describe(value)}")


def _numbers(name: str, value: Numbers | Tensor, lengths: Sequence[int]) -> list[float]:
    found = value.tolist() if isinstance(value, Tensor) else value
    listed = list(found) if isinstance(found, Sequence) else [found]
    for number in listed:
        check_real(name, number)
    if len(listed) not in lengths:
        wanted = " or ".join(str(n) for n in dict.fromkeys(lengths))
        raise ValueError(f"{name} must have {wanted} numbers, got {len(listed)}")
    return [float(number) for number in listed]
