"""Checkpoints that `from_pretrained` changes as it loads them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter


class _WithAxis(ConversionOps):
    """Gives a scalar the shape (1,): Learnable's coefficients once had the shape ()."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        del source_patterns, kwargs
        (found,) = input_dict.values()
        given = found[0] if isinstance(found, list) else found
        return {target_patterns[0]: given if given.dim() else given.reshape(1)}

    @property
    def reverse_op(self) -> _WithAxis:
        return self


def register_scalars(model_type: str) -> None:
    """Let checkpoints of `model_type` with coefficients of shape () load."""
    names = ("v_mix.lambda_v", "v_mix.lambda_first")
    register_checkpoint_conversion_mapping(
        model_type, [WeightConverter(name, name, [_WithAxis()]) for name in names], overwrite=True
    )
