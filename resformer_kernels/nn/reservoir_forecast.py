"""Reservoirs in closed loop: a readout's output drives the next step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from resformer_kernels._core.checks import check_flag, check_tensor, describe, integer
from resformer_kernels.nn.readout import LinearReadout
from resformer_kernels.nn.reservoir_run import RunsReservoir
from resformer_kernels.nn.ridge import Ridge
from resformer_kernels.nn.rls import RLS
from resformer_kernels.reservoir.segments import segment_length

Readout = Callable[[Tensor], Tensor]


class Forecasts(RunsReservoir):
    """A reservoir that runs in closed loop."""

    @torch.no_grad()
    def free_run(
        self,
        readout: Readout,
        state: Tensor,
        steps: int,
        *,
        inputs: Tensor | None = None,
        initial_feedback: Tensor | None = None,
        fold: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Feed the readout's output y = R(h) back, as the next input or through W_fb.

        Without feedback weights the output is the next input, as in forecasts of the input itself:
        y_t = R(h_t) and h_{t+1} = F(h_t, y_t) for t = 0 to steps - 1. With feedback weights every
        step reads its own input and the output before it: h_{t+1} = F(h_t, u_t, y_t) and
        y_{t+1} = R(h_{t+1}), where y_0 is `initial_feedback`. Steps one by one are products of
        PyTorch, whatever `backend` is; those of CSR are calls of the scan.

        Folded, a linear readout y = A h + c becomes part of the weights, W' = W + W_in A and
        b' = b + W_in c (or W_fb), made in float64, and one scan runs all steps. In float64 that
        changes nothing but the speed. In float32 the large terms of A h, which cancel, are summed
        in float32, where `Ridge` and `RLS` sum them in float64: outputs differ by some rounding
        errors more, which a chaotic series amplifies.

        Args:
            readout: maps a state (B, N) to y (B, n_in), with feedback weights (B, m): a fitted
                `Ridge` or `RLS`, a module or a function.
            state: the start h_0, (B, N).
            steps: number of outputs, at least 1.
            inputs: u, (B, steps, n_in), of a reservoir with feedback and inputs.
            initial_feedback: the y that the first step reads, (B, m), such as the last known
                target; None: R(h_0).
            fold: fold the readout, which must be a `Ridge`, `RLS` or `torch.nn.Linear`. W' is dense
                (N, N), whatever W is.

        Returns:
            The outputs (B, steps, n_in), the first read from `state` itself; with feedback weights
            (B, steps, m), the first read after the first step. And the last state (B, N). A
            stateful reservoir's stored state is unchanged.

        Raises:
            ValueError, TypeError: an argument of a wrong shape or type, or one that this reservoir
                has no use for; the message names it.
        """
        steps = integer("steps", steps, 1)
        check_flag("fold", fold)
        self._check_loop(state, steps, inputs, initial_feedback)
        if fold:
            return self._folded(_linear(readout), state, steps, inputs, initial_feedback)
        return self._step_by_step(readout, state, steps, inputs, initial_feedback)

    def _step_by_step(
        self,
        readout: Readout,
        state: Tensor,
        steps: int,
        inputs: Tensor | None,
        given: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        read, step = [], self.stepper(len(state))
        for t in range(steps):
            read.append(readout(state) if t or given is None else given)
            self._check_output(read[-1], state)
            drive = read[-1].to(state.dtype)
            if inputs is not None:
                drive = torch.cat((inputs[:, t].to(state.dtype), drive), -1)
            state = step(state, drive)
        outputs = [*read[1:], readout(state)] if self.feedback_dim else read
        return torch.stack(outputs, 1), state

    def _folded(
        self,
        readout: LinearReadout | nn.Linear,
        state: Tensor,
        steps: int,
        inputs: Tensor | None,
        given: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        outputs = []
        if given is not None:  # not yet the readout's own output
            first, state = self._step_by_step(
                readout, state, 1, None if inputs is None else inputs[:, :1], given
            )
            outputs, steps = [first], steps - 1
            inputs = None if inputs is None else inputs[:, 1:]
        self._check_output(readout(state), state)
        weight, constant = self._fold(readout, state)
        kept = [] if inputs is None else [self.input_weight.to(state.dtype)]
        options = {"weight": weight, "input_weight": torch.cat((*kept, constant), 1)}
        length = segment_length(state.numel(), state.device)
        for at in range(0, steps, length):
            ones = state.new_ones((len(state), min(length, steps - at), 1))
            own = [] if inputs is None else [inputs[:, at : at + length].to(state.dtype)]
            drive = torch.cat((*own, ones), -1)
            # A closed loop does not forget, so that chunks of time would all run again.
            states, last = self.run(drive, state, mode="sequential", **options)
            if not self.feedback_dim:
                states = torch.cat((state[:, None], states[:, :-1]), 1)
            outputs.append(readout(states))
            state = last
        return torch.cat(outputs, 1), state

    def _fold(self, readout: LinearReadout | nn.Linear, state: Tensor) -> tuple[Tensor, Tensor]:
        """W' (N, N) in the state's dtype, and the weights (N, 1) of a constant input of 1."""
        if self._values.dim() == 3 and self.activation == "softmax":
            raise ValueError("fold must be False where softmax runs over the units of each group")
        back = self.input_weight if self.feedback_weight is None else self.feedback_weight
        exact = self.dense_weight().double() + back.double() @ readout.weight.double()
        weight = exact.to(state.dtype)
        # What rounding W' takes away at the start; and b would lose digits by adding W_in c.
        constant = (exact - weight.double()) @ state.double().mean(0)
        if readout.bias is not None:
            constant = constant + back.double() @ readout.bias.double()
        return weight, constant[:, None].to(state.dtype)

    def _check_loop(
        self, state: Tensor, steps: int, inputs: Tensor | None, given: Tensor | None
    ) -> None:
        check_tensor("state", state, 2, f"(batch, {self.units})")
        if state.shape[1] != self.units:
            raise ValueError(f"state must be (batch, {self.units}), got {describe(state)}")
        if state.dtype != self.state_dtype:
            raise TypeError(f"state must be {self.state_dtype}, got {state.dtype}")
        fed, batch = self.feedback_dim, len(state)
        shapes = {
            "inputs": (inputs, (batch, steps, self.input_dim), fed and self.input_dim),
            "initial_feedback": (given, (batch, fed), fed),
        }
        for name, (value, shape, used) in shapes.items():
            if value is None:
                if name == "inputs" and used:
                    raise ValueError(f"inputs must be given, {shape}: the reservoir has some")
                continue
            if not used:
                why = "feedback" if not fed else "inputs beside its feedback"
                raise ValueError(f"{name} is for a reservoir with {why}, this has none")
            check_tensor(name, value, len(shape), f"{shape}")
            if value.shape != shape:
                raise ValueError(f"{name} must be {shape}, got {describe(value)}")

    def _check_output(self, output: Tensor, state: Tensor) -> None:
        shape = len(state), self.feedback_dim or self.input_dim
        if not isinstance(output, Tensor) or output.shape != shape:
            raise ValueError(
                f"readout must map states {tuple(state.shape)} to {shape}, gave {describe(output)}"
            )


def _linear(readout: Readout) -> LinearReadout | nn.Linear:
    """The readout, if all that it does is y = A h + c; else TypeError."""
    for kind in (Ridge, RLS, nn.Linear):
        # A subclass may do more, as may hooks.
        if type(readout) is kind and not (readout._forward_hooks or readout._forward_pre_hooks):
            return readout
    raise TypeError(
        f"readout must be a Ridge, an RLS or a torch.nn.Linear without hooks to be folded, got "
        f"{describe(readout)}"
    )
