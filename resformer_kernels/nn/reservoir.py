"""A fixed random reservoir as a module, with ReservoirPy's argument names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_flag, integer, real
from resformer_kernels.nn.arguments import Numbers, check_choice, check_finite, reals
from resformer_kernels.nn.reservoir_matrix import HoldsMatrix, as_taken
from resformer_kernels.nn.reservoir_weights import (
    TOPOLOGIES,
    draw_inputs,
    draw_weight,
    spectral_radius,
)
from resformer_kernels.nn.ridge import Ridge
from resformer_kernels.nn.state import KeepsState
from resformer_kernels.reservoir.api import reservoir_scan
from resformer_kernels.reservoir.record import ACTIVATIONS, UNBOUNDED


class Reservoir(KeepsState, HoldsMatrix):
    """h_t = (1 - lr) h_{t-1} + lr f(W h_{t-1} + W_in u_t + b), with fixed random W, W_in and b.

    A leaky echo state network (Jaeger, 2001), the memory of Liu and Xu, arXiv 2509.24074, run by
    `reservoir_scan`. Names and distributions are ReservoirPy's: W is normal, W_in and b are
    ±scaling. They and lr are buffers: saved, moved and cast with the module, and never trained. The
    state of a module in 16 bits stays float32. A module made on the meta device is filled by
    `load_state_dict(..., assign=True)`.

    Args:
        units: N, the length of the state over all groups.
        input_dim: n_in, the length of an input.
        lr: the leak a, in [0, 1]: one number, one per group, or one per unit.
        sr: the spectral radius that each group's W is scaled to: one number, or one per group.
        input_scaling: the magnitude of W_in's entries: one number, or one per input.
        rc_connectivity, input_connectivity: the fraction of nonzero entries of W and of W_in.
        bias_scaling: the magnitude of b's entries; 0: no bias.
        activation: f, "tanh", "relu", "identity", "sigmoid", "softplus" or, over the units of each
            group, "softmax".
        seed: seeds every draw. A seed gives the same reservoir, up to rounding, on every machine.
        groups: independent reservoirs of N / groups units side by side; each gets every input.
        topology: "random"; "ring", where each unit gets the previous one's state with weight sr; or
            "diagonal", without connections between units, with weights uniform in [-sr, sr].
        layout: "dense", or "csr" to store and multiply only W's nonzero entries.
        stateful: a call continues from the last one's final state ("all-time" memory), until
            `reset`. That state moves, casts and copies with the module; checkpoints do not hold it.
        keep_graph: the stored state keeps its autograd graph, so that gradients cross calls, until
            `detach`. Copies of the module hold no graph.
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
        keep_graph: bool = False,
        mode: str = "auto",
        tolerance: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.units, self.input_dim = integer("units", units, 1), integer("input_dim", input_dim, 1)
        self.groups = integer("groups", groups, 1)
        if self.units % self.groups or (self.groups > 1 and topology != "random"):
            raise ValueError(
                f"units {units} must be a multiple of groups {groups}, and groups 1 unless "
                f"topology is 'random', got topology {topology!r}"
            )
        check_choice("topology", topology, TOPOLOGIES)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("layout", layout, ("dense", "csr"))
        if layout == "csr" and (self.groups > 1 or topology != "random"):
            raise ValueError("layout 'csr' is for topology 'random' with groups 1")
        check_flag("stateful", stateful)
        check_flag("keep_graph", keep_graph)
        self.activation, self.topology, self.layout = activation, topology, layout
        self.stateful, self.keep_graph = stateful, keep_graph
        self.mode, self.tolerance, self.backend = mode, tolerance, backend
        leaks = reals("lr", lr, (1, self.groups, self.units))
        if not all(0 <= a <= 1 for a in leaks):
            raise ValueError(f"lr must lie in [0, 1], got {lr}")
        radii = reals("sr", sr, (1, self.groups))
        if not all(radius >= 0 for radius in radii):
            raise ValueError(f"sr must be at least 0, got {radii}")
        radii *= self.groups // len(radii)
        scaling = reals("input_scaling", input_scaling, (1, self.input_dim))
        (bias,) = reals("bias_scaling", bias_scaling, (1,))
        rc_share = _share("rc_connectivity", rc_connectivity)
        input_share = _share("input_connectivity", input_connectivity)
        generator = torch.Generator().manual_seed(integer("seed", seed))
        dtype = torch.get_default_dtype()
        # The same draws, and eigenvalues, whatever the default device is.
        with torch.device("cpu"):
            leak = torch.tensor(leaks).repeat_interleave(self.units // len(leaks))
            self._register_weight(draw_weight(topology, self.units, rc_share, radii, generator))
            inputs = draw_inputs(self.units, self.input_dim, input_share, scaling, generator)
            signs = torch.randint(0, 2, (self.units,), generator=generator) * 2 - 1
            self.register_buffer("input_weight", inputs.to(dtype))
            self.register_buffer("bias", (bias * signs).to(dtype) if bias else None)
            self.register_buffer("leak", leak[0] if len(leaks) == 1 else leak)
            if activation in UNBOUNDED:
                self._warn_if_unstable()
        self.to(torch.get_default_device())

    @property
    def state(self) -> Tensor | None:
        """The state of a stateful reservoir, (B, N); None at the start."""
        return self._kept.get("state")

    @state.setter
    def state(self, state: Tensor | None) -> None:
        self._kept = {}
        if state is not None:
            self._keep(state=state)

    def step_matrices(self) -> list[Tensor]:
        """(1-a)I + aW, the step where f has slope 1, as tanh has at 0, and which no activation
        exceeds: float64, (n, n), one per group."""
        grouped = self._values.dim() == 3
        blocks = self._values if grouped else self.dense_weight()[None]
        leaks = self.leak.double().expand(self.units).view(len(blocks), -1)
        pairs = zip(blocks.double(), leaks, strict=True)
        return [torch.diag(1 - a) + a[:, None] * block for block, a in pairs]

    def _warn_if_unstable(self) -> None:
        radius = max(spectral_radius(step) for step in self.step_matrices())
        if radius > 1 - 1e-6:  # eigenvalues of modulus 1 come out a little below it, too
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
            stores a copy of the final state.

        Raises:
            ValueError: the stored state has another batch size. Otherwise as `reservoir_scan`.
        """
        if initial_state is None:
            sequences = inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            initial_state = self._stored(sequences)
        result, final_state = self.run(
            inputs, initial_state, cu_seqlens=cu_seqlens, reduce=reduce, targets=targets
        )
        if self.stateful:
            self._keep(state=final_state)
        return result, final_state

    def run(self, inputs: Tensor, initial_state: Tensor | None, **options: Any) -> Any:
        """`reservoir_scan` of these weights. The stored state is neither read nor changed."""
        dtype, bias = self.state_dtype, self.bias
        return reservoir_scan(
            inputs,
            self._weight_of(as_taken(self._values)),
            input_weight=as_taken(self.input_weight),
            leak=self.leak.to(dtype),
            bias=None if bias is None else bias.to(dtype),
            initial_state=initial_state,
            activation=self.activation,
            mode=self.mode,
            tolerance=self.tolerance,
            backend=self.backend,
            **options,
        )

    def _stored(self, sequences: int) -> Tensor | None:
        state = self.state if self.stateful else None
        if state is not None and state.shape[0] != sequences:
            raise ValueError(
                f"inputs must hold {state.shape[0]} sequences, as the calls before, got "
                f"{sequences}: call reset() to start anew"
            )
        return state

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

        Raises:
            ValueError: inputs or a target that is fitted to is not finite, or an argument is out of
                range. The readout and the stored state are then unchanged.
        """
        washout = integer("washout", washout)
        if not 0 <= washout <= inputs.shape[1]:
            raise ValueError(f"washout must lie in [0, {inputs.shape[1]}], got {washout}")
        fitted = targets[:, washout:].double()
        check_finite("inputs", inputs)
        check_finite("targets", fitted, first=(0, washout, 0))
        _, state = self.run(inputs[:, :washout], self._stored(inputs.shape[0]), reduce="last")
        # The intercept needs the sum of the states: their product with a column of ones.
        ones = torch.cat((fitted, torch.ones_like(fitted[..., :1])), -1)
        sums, final_state = self.run(inputs[:, washout:], state, reduce="gram", targets=ones)
        gram, cross = sums
        readout.update_gram(
            gram,
            cross[:, :-1],
            count=fitted.shape[0] * fitted.shape[1],
            x_sum=cross[:, -1],
            y_sum=fitted.sum((0, 1)),
        )
        if self.stateful:
            self._keep(state=final_state)
        return final_state

    @torch.no_grad()
    def free_run(
        self, readout: Callable[[Tensor], Tensor], state: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Feed the readout's output back as the next input.

        Args:
            readout: maps a state (B, N) to the next input (B, n_in), such as a fitted `Ridge`.
            state: the start, (B, N).
            steps: number of outputs, at least 1.

        Returns:
            The outputs (B, steps, n_in), the first read from `state` itself, and the last state
            (B, N). A stateful reservoir's stored state is unchanged.
        """
        outputs = []
        for _ in range(integer("steps", steps, 1)):
            outputs.append(readout(state))
            _, state = self.run(outputs[-1][:, None], state, reduce="last")
        return torch.stack(outputs, 1), state

    def extra_repr(self) -> str:
        """The arguments that print shows."""
        return (
            f"units={self.units}, input_dim={self.input_dim}, activation={self.activation!r}, "
            f"groups={self.groups}, topology={self.topology!r}, stateful={self.stateful}"
        )


def _share(name: str, value: float) -> float:
    share = real(name, value)
    if not 0 < share <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {share}")
    return float(share)
