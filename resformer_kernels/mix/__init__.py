"""Mixing values: a weighted sum of any number of them, or of one and rows of a table."""

from resformer_kernels.mix.api import mix_value_embedding, mix_values

__all__ = ["mix_value_embedding", "mix_values"]
