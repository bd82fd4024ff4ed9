"""A fixed reservoir as a module, with ReservoirPy's argument names."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_flag, describe, integer, real
from resformer_kernels.nn.arguments import Numbers, check_choice, reals
from resformer_kernels.nn.given_weights import Draws, GivenWeights, agreed, read_weights
from resformer_kernels.nn.reservoir_forecast import Forecasts
from resformer_kernels.nn.reservoir_stream import Streams
from resformer_kernels.nn.reservoir_weights import TOPOLOGIES
from resformer_kernels.reservoir.record import ACTIVATIONS, UNBOUNDED


class Reservoir(Streams, Forecasts):
    """h_t = (1 - lr) h_{t-1} + lr f(W h_{t-1} + W_in u_t + W_fb y_{t-1} + b), with fixed weights.

    A leaky echo state network (Jaeger, 2001), the memory of Liu and Xu, arXiv 2509.24074, run by
    `reservoir_scan`. Names and distributions are ReservoirPy's: W is normal, W_in, W_fb and b are
    ±scaling. They and lr are buffers: saved, moved and cast with the module, and never trained. The
    state of a module in 16 bits stays float32. A module made on the meta device is filled by
    `load_state_dict(..., assign=True)`.

    Weights that are given and not drawn are copied into buffers of `dtype`. They are tensors of any
    layout, arrays, nested sequences, or sparse matrices of SciPy, on any device, and without
    gradients. Sizes may be left out where they have them.

    Args:
        units: N, the length of the state over all groups.
        input_dim: n_in, the length of an input. 0: feedback alone drives the reservoir.
        lr: the leak a, in [0, 1]: one number, one per group, or one per unit.
        sr: the spectral radius that each group's W is scaled to: one number, or one per group.
            None: 0.9, and a given W is taken as it is.
        input_scaling: the magnitude of W_in's entries: one number, or one per input. Columns of a
            given Win are multiplied by it, as those of Wfb by fb_scaling.
        rc_connectivity, input_connectivity, fb_connectivity: the fraction of nonzero entries of W,
            of W_in and of W_fb that are drawn.
        bias_scaling: the magnitude of b's entries; 0: no bias.
        activation: f, "tanh", "relu", "identity", "sigmoid", "softplus" or, over the units of each
            group, "softmax".
        seed: seeds every draw. A seed gives the same reservoir, up to rounding, on every machine.
        groups: independent reservoirs of N / groups units side by side; each gets every input.
        topology: "random"; "ring", where each unit gets the previous one's state with weight sr; or
            "diagonal", without connections between units, with weights uniform in [-sr, sr].
        layout: "dense", or "csr" to store and multiply only W's nonzero entries. "auto": stored
            densely and, in float32 on a CPU, multiplied as CSR where that was measured to be faster
            and no gradient is wanted: from 256 units with an eighth of the entries, or 512 with a
            quarter (`LARGEST_SHARES`), in a batch of 4 or more or over 512 steps or more, and not
            under torch.compile, which traces no sparse tensor. States then differ from those of
            "dense" by rounding.
        W: the recurrent weights: (N, N), where a sparse one has layout "csr"; (groups, n, n); (N,)
            for a diagonal; or a `RingWeight`. topology and groups are then W's.
        Win: W_in, (N, n_in); Wfb: W_fb, (N, m); bias: b, a number, (N,) or (N, 1).
        feedback_dim: m, the length of the outputs y that are fed back; None: Wfb's, or 0.
        fb_scaling: the magnitude of W_fb's entries: one number, or one per output.
        dtype: the dtype of the weights; None: torch's default.
        stateful: a call continues from the last one's final state ("all-time" memory), until
            `reset`. That state moves, casts and copies with the module; checkpoints do not hold it.
        keep_graph: the stored state keeps its autograd graph, so that gradients cross calls, until
            `detach`. Copies of the module hold no graph.
        mode, tolerance, backend: as in `reservoir_scan`.

    Attributes:
        layout: "dense" or "csr", how W is stored. running_layout: how a long call without
            gradients multiplies it; `explain(reservoir, inputs)` says it of any call.
        weight: W as it is stored; input_weight: (N, n_in); feedback_weight: (N, m) or None;
            bias: (N,) or None; leak: () or (N,).
        state: the state of a stateful reservoir, (B, N); None at the start.
        feedback: its last teacher, (B, m); None at the start, and without feedback.

    Raises:
        ValueError, TypeError: an argument is out of range, or two contradict one another; the
            message names them.

    Warns:
        UserWarning: the activation is unbounded and (1-a)I + aW has an eigenvalue of modulus 1 or
            more, so that states may grow without limit.
    """

    __resformer_explainable__ = True

    def __init__(
        self,
        units: int | None = None,
        input_dim: int | None = None,
        *,
        lr: Numbers = 1.0,
        sr: Numbers | None = None,
        input_scaling: Numbers = 1.0,
        rc_connectivity: float = 0.1,
        input_connectivity: float = 0.1,
        bias_scaling: float = 0.0,
        activation: str = "tanh",
        seed: int = 0,
        groups: int = 1,
        topology: str = "random",
        layout: str = "auto",
        W: Any = None,
        Win: Any = None,
        Wfb: Any = None,
        bias: Any = None,
        feedback_dim: int | None = None,
        fb_scaling: Numbers = 1.0,
        fb_connectivity: float = 0.1,
        dtype: torch.dtype | None = None,
        stateful: bool = False,
        keep_graph: bool = False,
        mode: str = "auto",
        tolerance: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        given = read_weights(W, Win, Wfb, bias)
        self._set_sizes(given, units, input_dim, feedback_dim)
        self._set_form(given, integer("groups", groups, 1), topology, layout)
        check_choice("activation", activation, ACTIVATIONS)
        check_flag("stateful", stateful)
        check_flag("keep_graph", keep_graph)
        self.activation, self.stateful, self.keep_graph = activation, stateful, keep_graph
        self.mode, self.tolerance, self.backend = mode, tolerance, backend
        leaks = reals("lr", lr, (1, self.groups, self.units))
        if not all(0 <= a <= 1 for a in leaks):
            raise ValueError(f"lr must lie in [0, 1], got {lr}")
        radii = reals("sr", 0.9 if sr is None else sr, (1, self.groups))
        if not all(radius >= 0 for radius in radii):
            raise ValueError(f"sr must be at least 0, got {radii}")
        (offset,) = reals("bias_scaling", bias_scaling, (1,))
        how = Draws(
            radii=None if sr is None and W is not None else radii * (self.groups // len(radii)),
            scaling=reals("input_scaling", input_scaling, (1, self.input_dim)),
            fb_scaling=reals("fb_scaling", fb_scaling, (1, self.feedback_dim)),
            bias_scaling=offset,
            rc_share=_share("rc_connectivity", rc_connectivity),
            input_share=_share("input_connectivity", input_connectivity),
            fb_share=_share("fb_connectivity", fb_connectivity),
        )
        generator = torch.Generator().manual_seed(integer("seed", seed))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {describe(dtype)}")
        # The same draws, and eigenvalues, whatever the default device is.
        with torch.device("cpu"):
            leak = torch.tensor(leaks, dtype=dtype).repeat_interleave(self.units // len(leaks))
            sizes = self.units, self.input_dim, self.feedback_dim
            weight, *others = given.completed(how, self.topology, sizes, generator)
            self._register_weight(weight, dtype)
            for name, value in zip(
                ("input_weight", "feedback_weight", "bias"), others, strict=True
            ):
                self.register_buffer(name, None if value is None else value.to(dtype))
            self.register_buffer("leak", leak[0] if len(leaks) == 1 else leak)
            if activation in UNBOUNDED:
                self._warn_if_unstable()
        self.to(torch.get_default_device())

    def _set_sizes(
        self, given: GivenWeights, units: int | None, input_dim: int | None, outputs: int | None
    ) -> None:
        if outputs is None and given.feedback_weight is None:
            outputs = 0
        self.units = agreed("units", units, 1, given.units())
        self.input_dim = agreed("input_dim", input_dim, 0, given.columns("Win"))
        self.feedback_dim = agreed("feedback_dim", outputs, 0, given.columns("Wfb"))
        if not self.input_dim and not self.feedback_dim:
            raise ValueError("input_dim must be at least 1 without feedback, got 0")

    def _set_form(self, given: GivenWeights, groups: int, topology: str, layout: str) -> None:
        check_choice("topology", topology, TOPOLOGIES)
        check_choice("layout", layout, ("auto", "dense", "csr"))
        topology, groups, layout = given.form(topology, groups, layout)
        self.chooses_layout = layout == "auto"
        layout = "dense" if self.chooses_layout else layout
        if self.units % groups or (groups > 1 and topology != "random"):
            raise ValueError(
                f"units {self.units} must be a multiple of groups {groups}, and groups 1 unless "
                f"topology is 'random', got topology {topology!r}"
            )
        if layout == "csr" and (groups > 1 or topology != "random"):
            raise ValueError("layout 'csr' is for topology 'random' with groups 1")
        self.topology, self.groups, self.layout = topology, groups, layout

    def _warn_if_unstable(self) -> None:
        radius = self._step_radius()
        if radius > 1 - 1e-6:  # eigenvalues of modulus 1 come out a little below it, too
            warnings.warn(
                f"activation {self.activation!r} is unbounded and the spectral radius of "
                f"(1-lr)I + lr W is {radius:.4g}: states may grow without limit; lower sr",
                UserWarning,
                stacklevel=3,
            )

    def forward(
        self,
        inputs: Tensor | None,
        initial_state: Tensor | None = None,
        *,
        teacher: Tensor | None = None,
        initial_feedback: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reduce: str = "none",
        targets: Tensor | None = None,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
        """Run over all time steps.

        With feedback the teacher takes the place of the outputs: step t reads y_{t-1}, the first
        step `initial_feedback`. Gradients flow to both.

        Args:
            inputs: u, (B, T, n_in), packed (total_steps, n_in) with cu_seqlens; None for n_in = 0.
            initial_state: h_0, (B, N) or (sequences, N); None: the stored state of a stateful
                reservoir, else zeros.
            teacher: y, (B, T, m) or packed (total_steps, m), of any floating dtype.
            initial_feedback: y_{-1}, (B, m) or (sequences, m); None: zeros, or where the stored
                state is taken, the last teacher of the call before.
            cu_seqlens, reduce, targets: as in `reservoir_scan`.

        Returns:
            (states or their reduction, final state), as `reservoir_scan`. A stateful reservoir
            stores a copy of the final state, and of each sequence's last teacher.

        Raises:
            ValueError: the stored state has another batch size, or there is a teacher without
                feedback or feedback without a teacher. Otherwise as `reservoir_scan`.
        """
        rows = teacher if inputs is None else inputs
        if initial_state is None and isinstance(rows, Tensor):
            count = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            stored = self._stored(count)
            initial_state = stored.get("state")
            if initial_feedback is None:
                initial_feedback = stored.get("feedback")
        drive, last = self.driven(inputs, teacher, initial_feedback, cu_seqlens)
        result, final_state = self.run(
            drive, initial_state, cu_seqlens=cu_seqlens, reduce=reduce, targets=targets
        )
        if self.stateful:
            self._keep(state=final_state, **({} if last is None else {"feedback": last}))
        return result, final_state

    def extra_repr(self) -> str:
        """The arguments that print shows."""
        fed = f"feedback_dim={self.feedback_dim}, " if self.feedback_dim else ""
        return (
            f"units={self.units}, input_dim={self.input_dim}, {fed}activation={self.activation!r}, "
            f"groups={self.groups}, topology={self.topology!r}, layout={self.layout!r}, "
            f"running_layout={self.running_layout!r}, stateful={self.stateful}"
        )


def _share(name: str, value: float) -> float:
    share = real(name, value)
    if not 0 < share <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {share}")
    return float(share)
