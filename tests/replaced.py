"""Constants of the package with other values, such that small inputs reach what large ones do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock


@contextmanager
def replaced(module: ModuleType, **values: Any) -> Iterator[None]:
    """Within it constants of `module` have these values.

    The module's `check_constants()` says which values they may have: AssertionError for others.
    """
    with mock.patch.multiple(module, **values):
        module.check_constants()
        yield
