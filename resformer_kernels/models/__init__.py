"""Small complete models built from `resformer_kernels.nn`."""

from resformer_kernels.models.config import VARIANTS, LanguageModelConfig
from resformer_kernels.models.generation import Generation
from resformer_kernels.models.language_model import (
    LanguageModel,
    parameter_count,
    with_parameter_budget,
)
from resformer_kernels.models.reservoir_classifier import ReservoirClassifier
from resformer_kernels.models.sentence_encoder import MiniLM, SentenceEncoder, byte_tokens

__all__ = [
    "VARIANTS",
    "Generation",
    "LanguageModel",
    "LanguageModelConfig",
    "MiniLM",
    "ReservoirClassifier",
    "SentenceEncoder",
    "byte_tokens",
    "parameter_count",
    "with_parameter_budget",
]
