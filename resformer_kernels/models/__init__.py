"""Small complete models built from `resformer_kernels.nn`."""

from resformer_kernels.models.config import VARIANTS, LanguageModelConfig
from resformer_kernels.models.generation import Generation
from resformer_kernels.models.language_model import (
    LanguageModel,
    parameter_count,
    with_parameter_budget,
)

__all__ = [
    "VARIANTS",
    "Generation",
    "LanguageModel",
    "LanguageModelConfig",
    "parameter_count",
    "with_parameter_budget",
]
