"""Fixtures that the tests of the cache share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from resformer_kernels.kvcache.cache import pages


@pytest.fixture(params=["contiguous", "paged"])
def paged(request: pytest.FixtureRequest) -> bool:
    """Both forms; paging skips without the host module, and fails where it is required."""
    if request.param == "paged" and pages.unavailable_reason() is not None:
        request.getfixturevalue("native")
    return bool(request.param == "paged")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
