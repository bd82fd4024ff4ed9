"""Refuse arguments that the drop-ins accept only to match a signature."""

from __future__ import annotations

from typing import Any

from resformer_kernels._core.checks import check_real


def refuse_alibi(alibi_slopes: Any, instead: str) -> None:
    """Raise NotImplementedError unless alibi_slopes is None; `instead` names the alternative."""
    if alibi_slopes is not None:
        raise NotImplementedError(
            f"alibi_slopes must be None: the kernels have no ALiBi; {instead}"
        )


def refuse_dropout(dropout_p: Any) -> None:
    """Raise NotImplementedError unless dropout_p is 0, and ValueError outside [0, 1]."""
    check_real("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a probability, 0 to 1, got {dropout_p}")
    if dropout_p > 0:
        raise NotImplementedError(
            f"dropout_p must be 0, got {dropout_p}: the kernels drop no attention weights"
        )
