"""Check kernels on your own hardware: input factories, error budgets, poisoned outputs.

>>> from resformer_kernels.testing import AttentionCase, compare_case
>>> all(row.ok for row in compare_case(AttentionCase(causal=True), backend="auto"))
True
"""

from resformer_kernels.testing.budgets import Comparison, compare, compare_case
from resformer_kernels.testing.inputs import (
    BIAS_KINDS,
    COEFFICIENT_FORMS,
    LAYOUTS,
    REPRESENTATIVE,
    AttentionCase,
    Inputs,
    attention_inputs,
    laid_out,
)
from resformer_kernels.testing.poison import poisoned

__all__ = [
    "BIAS_KINDS",
    "COEFFICIENT_FORMS",
    "LAYOUTS",
    "REPRESENTATIVE",
    "AttentionCase",
    "Comparison",
    "Inputs",
    "attention_inputs",
    "compare",
    "compare_case",
    "laid_out",
    "poisoned",
]
