"""What modules here share: tensors kept between calls, and checkpoints changed before they load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resformer_kernels._core.checks import describe


class KeepsTensors(nn.Module):
    """A module with tensors of its own in `_kept`, by name, that are neither saved nor trained.

    They move and cast with the module, to no narrower dtype than `narrowest`, and go into its
    copies without a graph. They are no buffers: DDP would send one process's to all others, and a
    moving average would mix them in.
    """

    narrowest = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, Tensor] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsTensors:
        super()._apply(fn, recurse)
        moved = {}
        for name, tensor in self._kept.items():
            like = fn(tensor)
            if like.is_meta or not tensor.is_meta:  # what left the meta device holds nothing
                dtype = torch.promote_types(like.dtype, self.narrowest)
                moved[name] = tensor.to(like.device, dtype)
        self._kept = moved
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {name: x.detach() for name, x in self._kept.items()}}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept between calls."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.values())


def _copied(state: Tensor) -> Tensor:
    """A copy made outside inference mode, whose tensors training refuses."""
    with torch.inference_mode(False):
        return state.detach().clone()


# An op, since a compiled graph would run its copy in the mode that it is called in.
_LIBRARY = torch.library.Library("resformer_nn", "DEF")
_LIBRARY.define("kept(Tensor state) -> Tensor")
_LIBRARY.impl("kept", _copied, "CompositeExplicitAutograd")
torch.library.register_fake("resformer_nn::kept", torch.empty_like, lib=_LIBRARY)


class KeepsState(KeepsTensors):
    """A module whose calls continue from the last one's final states, the rows of `_kept`.

    With `keep_graph` the states keep their autograd graph.
    """

    keep_graph: bool

    def _keep(self, **states: Tensor) -> None:
        self._kept = {name: self._held(state) for name, state in states.items()}

    def _held(self, state: Tensor) -> Tensor:
        """A copy: a result belongs to the caller, and a part of it would keep all of its memory."""
        if self.keep_graph and state.requires_grad:
            return state.clone()
        return torch.ops.resformer_nn.kept(state.detach())

    def reset(self, sequences: Tensor | None = None) -> None:
        """Reset all rows of the batch (None), or those selected by a bool mask (B,) or indices."""
        if sequences is None:
            self._kept = {}
        else:
            self._keep(**{name: cleared(x, sequences) for name, x in self._kept.items()})

    def detach(self) -> None:
        """Detach the states from their graph, as truncated backpropagation needs."""
        self._kept = {name: state.detach() for name, state in self._kept.items()}


class AdaptsCheckpoint(nn.Module):
    """A module that reads its part of a checkpoint before `load_state_dict` does."""

    def adapt_checkpoint(self, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Change what `state` holds under `prefix`, or the module's buffers, so that they fit.

        `state` is a copy that holds the caller's tensors. What is added to `errors` is reported
        with torch's own.
        """
        raise NotImplementedError(f"{type(self).__name__} must define adapt_checkpoint")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.adapt_checkpoint(state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
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
