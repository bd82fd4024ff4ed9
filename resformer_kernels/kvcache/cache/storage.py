"""The tensors of a cache: codes and, where they are quantised, their scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resformer_kernels.kvcache.record import QUANTISED
from resformer_kernels.kvcache.reference import dequantise


class Copy(NamedTuple):
    """The first `tokens` tokens of row or page `source`, to be copied to `target`."""

    source: int
    target: int
    tokens: int


class Slots:
    """Keys or values: (slots, rows, length, heads, head_dim), a row being a sequence or a page.

    `scales` is (slots, rows, length, heads) float32 where `codes` is int8 or float8, else None.
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.scales: Tensor | None = None
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.codes = torch.zeros(shape, dtype=dtype, device=device)
            if dtype in QUANTISED:
                self.scales = torch.zeros(shape[:-1], dtype=torch.float32, device=device)

    def __getstate__(self) -> tuple[Tensor, torch.dtype, Tensor | None]:
        # torch cannot read a pickled float8 tensor back; its bytes it can.
        codes = self.codes
        stored = codes.view(torch.int8) if codes.dtype.itemsize == 1 else codes
        return stored, codes.dtype, self.scales

    def __setstate__(self, state: tuple[Tensor, torch.dtype, Tensor | None]) -> None:
        stored, dtype, scales = state
        with torch.inference_mode(False):
            self.codes = _writable(stored).view(dtype)
            self.scales = None if scales is None else _writable(scales)

    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, and scales of a quantised cache."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)

    def slot(self, slot: int) -> tuple[Tensor, Tensor | None]:
        """Views of one slot."""
        return self.codes[slot], None if self.scales is None else self.scales[slot]

    def read(self, slot: int, table: Tensor | None, tokens: int) -> Tensor:
        """The first `tokens` tokens of each sequence, (B, tokens, heads, head_dim): a view where
        row b is sequence b, else a copy. Where they are quantised, float32."""
        rows = [tensor[slot] for tensor in self.tensors()]
        if table is not None:
            rows = [_gather(tensor, table, tokens) for tensor in rows]
        codes, *scales = (tensor[:, :tokens] for tensor in rows)
        return dequantise(codes, scales[0], torch.float32) if scales else codes

    def copy(self, copies: Sequence[Copy]) -> None:
        """Make the copies, in every slot. No target may be a source."""
        for tokens in {copy.tokens for copy in copies}:
            pairs = [copy for copy in copies if copy.tokens == tokens]
            sources = torch.tensor([copy.source for copy in pairs], device=self.codes.device)
            targets = torch.tensor([copy.target for copy in pairs], device=self.codes.device)
            for tensor in self.tensors():
                tensor[:, targets, :tokens] = tensor[:, sources, :tokens]


def _writable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _gather(rows: Tensor, table: Tensor, tokens: int) -> Tensor:
    """Rows (R, length, ...) gathered through a block table (B, n) into (B, tokens, ...)."""
    needed = table[:, : -(-tokens // rows.shape[1])].long()
    return rows[needed].flatten(1, 2)[:, :tokens]
