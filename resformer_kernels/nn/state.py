"""What modules here share: tensors kept between calls, and checkpoints changed before they load."""

from __future__ import annotations

from typing import Any

from torch import nn


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
