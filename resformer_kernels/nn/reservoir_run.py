"""What every use of a reservoir stands on: the scan of its weights under inputs and a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_tensor, describe
from resformer_kernels.nn.reservoir_layout import ChoosesLayout
from resformer_kernels.nn.state import KeepsState
from resformer_kernels.reservoir.api import reservoir_scan
from resformer_kernels.reservoir.record import check_call
from resformer_kernels.reservoir.reference import step_of


class RunsReservoir(KeepsState, ChoosesLayout):
    """A module whose weights `reservoir_scan` runs. It keeps its states, and the last teacher."""

    input_dim: int
    feedback_dim: int
    stateful: bool
    activation: str
    mode: str
    tolerance: float | None
    backend: str
    input_weight: Tensor
    feedback_weight: Tensor | None
    bias: Tensor | None

    @property
    def state(self) -> Tensor | None:
        """The state of a stateful reservoir, (B, N); None at the start."""
        return self._kept.get("state")

    @state.setter
    def state(self, state: Tensor | None) -> None:
        self._kept = {}
        if state is not None:
            self._keep(state=state)

    @property
    def feedback(self) -> Tensor | None:
        """The last teacher of a stateful reservoir with feedback, (B, m); None at the start."""
        return self._kept.get("feedback")

    def __getstate__(self) -> dict[str, Any]:
        # Entries of W beside W itself are found anew.
        return super().__getstate__() | {"_entries": None}

    def _stored(self, sequences: int) -> dict[str, Tensor]:
        """What a stateful reservoir keeps for `sequences` sequences; empty at the start."""
        kept = self._kept if self.stateful else {}
        for tensor in kept.values():
            if tensor.shape[0] != sequences:
                raise ValueError(
                    f"inputs must hold {tensor.shape[0]} sequences, as the calls before, got "
                    f"{sequences}: call reset() to start anew"
                )
        return kept

    def run(self, inputs: Tensor, initial_state: Tensor | None, **options: Any) -> Any:
        """`reservoir_scan` of these weights; `options` replace its arguments.

        inputs are all that drives it: with feedback [u_t, y_{t-1}], (B, T, n_in + m). What is
        kept is neither read nor changed.
        """
        own = self._arguments() | {"backend": self.backend}
        if "weight" not in options:
            others = [initial_state, options.get("targets")]
            own["weight"] = self.running_weight(inputs, others, options)
        return reservoir_scan(inputs, initial_state=initial_state, **own | options)

    def stepper(self, sequences: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The function of h_{t-1} (B, N) and all that drives a step (B, n_in + m) that gives h_t.

        It is made of PyTorch's products, other than for CSR, whose products depend on how PyTorch
        was built: a kernel arranges W anew at every call, which takes longer than the step.
        """
        if self.layout == "csr":
            return lambda state, drive: self.run(drive[:, None], state)[1]
        width, device = self.input_dim + self.feedback_dim, self.leak.device
        inputs = torch.empty((sequences, 1, width), dtype=self.state_dtype, device=device)
        call = check_call(
            inputs,
            initial_state=None,
            cu_seqlens=None,
            reduce="none",
            targets=None,
            return_info=False,
            **self._arguments(),
        )
        step = step_of(call.scan)

        def alone(state: Tensor, drive: Tensor) -> Tensor:
            with torch.autocast(device.type, enabled=False):
                return step(state, drive)

        return alone

    def _arguments(self) -> dict[str, Any]:
        """What the scan gets of this module, but for the backend."""
        drive, fed = self.input_weight, self.feedback_weight
        return {
            "weight": self.weight,
            "input_weight": drive if fed is None else torch.cat((drive, fed), 1),
            "leak": self.leak,
            "bias": self.bias,
            "activation": self.activation,
            "mode": self.mode,
            "tolerance": self.tolerance,
        }

    def driven(
        self,
        inputs: Tensor | None,
        teacher: Tensor | None,
        first: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What drives the scan, and each sequence's last teacher: [u_t, y_{t-1}] and (B, m), or
        the inputs themselves and None without feedback.

        Args:
            inputs: u, (B, T, n_in) or packed (total, n_in); None for n_in = 0.
            teacher: y, (B, T, m) or packed (total, m).
            first: y_{-1}, (B, m) or (sequences, m); None: zeros.
        """
        rank, steps = (3, "batch, time") if cu_seqlens is None else (2, "total_steps")
        if inputs is not None or self.input_dim:
            check_tensor("inputs", inputs, rank, f"({steps}, {self.input_dim})")
            assert inputs is not None
            if inputs.shape[-1] != self.input_dim:
                raise ValueError(f"inputs must be ({steps}, {self.input_dim}), {_got(inputs)}")
        if not self.feedback_dim:
            for name, value in (("teacher", teacher), ("initial_feedback", first)):
                if value is not None:
                    raise ValueError(f"{name} is for a reservoir with feedback, feedback_dim is 0")
            assert inputs is not None
            return inputs, None
        check_tensor("teacher", teacher, rank, f"({steps}, {self.feedback_dim})")
        assert teacher is not None
        leading = teacher.shape[:-1] if inputs is None else inputs.shape[:-1]
        if teacher.shape != (*leading, self.feedback_dim):
            raise ValueError(f"teacher must be {(*leading, self.feedback_dim)}, {_got(teacher)}")
        own = self.state_dtype if inputs is None else inputs.dtype
        dtype = torch.promote_types(own, torch.float32)
        sequences = leading[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        start = self._first(first, sequences, teacher).to(dtype)
        before, last = _shifted(teacher.to(dtype), start, cu_seqlens)
        return before if inputs is None else torch.cat((inputs.to(dtype), before), -1), last

    def _first(self, first: Tensor | None, sequences: int, like: Tensor) -> Tensor:
        shape = sequences, self.feedback_dim
        if first is None:
            return like.new_zeros(shape)
        check_tensor("initial_feedback", first, 2, f"{shape}")
        if first.shape != shape:
            raise ValueError(f"initial_feedback must be {shape}, {_got(first)}")
        return first


def _shifted(teacher: Tensor, first: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The teacher one step later, each sequence after its `first`; and each sequence's last."""
    if cu_seqlens is None:
        every = torch.cat((first[:, None], teacher), 1)
        return every[:, :-1], every[:, -1]
    rows, sequences = torch.cat((first, teacher)), first.shape[0]
    steps = torch.arange(teacher.shape[0], device=teacher.device)
    ends = cu_seqlens[1:].long()
    # Steps after the last sequence are read by nobody.
    own = torch.searchsorted(ends, steps, right=True).clamp(max=max(sequences - 1, 0))
    begins = steps == cu_seqlens[own] if sequences else steps < 0
    before = rows[torch.where(begins, own, steps + sequences - 1)]
    every = torch.arange(sequences, device=teacher.device)
    last = rows[torch.where(cu_seqlens.diff() > 0, ends + sequences - 1, every)]
    return before, last


def _got(value: Tensor) -> str:
    return f"got {describe(value)}"
