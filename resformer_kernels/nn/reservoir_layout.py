"""Whether a reservoir multiplies its dense W as CSR: where that was measured to be faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._core.select import explaining
from resformer_kernels.nn.reservoir_matrix import HoldsMatrix, csr_matrix

LARGEST_SHARES = ((512, 1 / 4), (256, 1 / 8))
"""(units, share of nonzero entries): from so many units, W with at most this share runs as CSR. On
two cores of an AMD EPYC (Zen 4) CSR took 1.1 to 5.6 times less than dense within these bounds, and
up to 1.5 times more beyond them (README of `reservoir_scan`)."""
FEWEST_ROWS = 4
"""Rows stepped at once from which CSR is multiplied by vectors of rows."""
SPLIT_STEPS = 512
"""Steps from which mode "auto" splits one sequence into more rows than that."""


class ChoosesLayout(HoldsMatrix):
    """A module that may hold W densely and multiply it as CSR.

    The entries are taken out of the dense W once, and compared with it at every call: buffers,
    checkpoints and casts are those of a dense reservoir, and a W that was written to is seen.
    """

    chooses_layout = False
    """Whether `layout="auto"` was asked for."""
    _entries: tuple[Tensor, Tensor] | None = None

    activation: str
    mode: str
    backend: str

    @property
    def running_layout(self) -> str:
        """ "csr" or "dense": what long inputs, or a batch, multiply W as, without gradients."""
        return "dense" if self.layout == "dense" and self._sparse_weight() is None else "csr"

    def running_weight(self, inputs: Any, others: list[Any], options: dict[str, Any]) -> Any:
        """W in the form in which a scan of `inputs` runs; `others` may want gradients too.

        CSR has no quicker gradient, and torch.compile traces no sparse tensor: both get dense W.
        """
        if torch.compiler.is_compiling() or not self.chooses_layout:
            return self.weight
        if type(inputs) is not Tensor or inputs.dim() < 2:
            return self.weight
        leaves = (inputs, *others, *self.buffers())
        # `explain` asks without gradients what a call with them takes.
        recorded = torch.is_grad_enabled() or explaining()
        wanted = recorded and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
        if wanted or not self._enough_rows(inputs, options):
            return self.weight
        found = self._sparse_weight()
        return self.weight if found is None else found

    def _enough_rows(self, inputs: Tensor, options: dict[str, Any]) -> bool:
        mode, offsets = options.get("mode", self.mode), options.get("cu_seqlens")
        if mode == "chunked" or (mode == "auto" and inputs.shape[-2] >= SPLIT_STEPS):
            return True
        sequences = inputs.shape[0] if offsets is None else offsets.shape[0] - 1
        return sequences >= FEWEST_ROWS

    def _sparse_weight(self) -> Tensor | None:
        """W as CSR; None where it runs dense."""
        values = self._values
        runs = (
            self.chooses_layout
            and type(values) is Tensor
            and values.dim() == 2
            and values.dtype is torch.float32
            and values.device.type == "cpu"
            and self.activation != "softmax"
            and self.backend in ("auto", "native")
            and MACHINE.cpu_library_reason() is None
        )
        if not runs:
            return None
        values = values.detach()
        count = int(values.count_nonzero())
        if not any(self.units >= n and count <= s * self.units**2 for n, s in LARGEST_SHARES):
            return None
        if self._entries is not None:
            places, matrix = self._entries
            if len(places) == count and torch.equal(values.take(places), matrix.values()):
                return matrix
        # Outside inference mode: training refuses tensors that were made in it.
        with torch.inference_mode(False), torch.no_grad():
            places = values.flatten().nonzero().squeeze(1)
            starts = self.units * torch.arange(self.units + 1, device=values.device)
            rows = torch.searchsorted(places, starts)
            matrix = csr_matrix(rows, places % self.units, values.take(places))
        self._entries = places, matrix
        return matrix
