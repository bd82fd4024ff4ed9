"""Tests whose cases are rows of a table that begin with their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def by_name(*arguments: str, table: Sequence[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """Run a test for each row (name, *values of `arguments`)."""
    rows = [pytest.param(*values, id=name) for name, *values in table]
    return pytest.mark.parametrize(arguments, rows)
