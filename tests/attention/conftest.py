"""The backends of attention that run here."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["native", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Each backend that has kernels: compiled ones, and Triton's in its interpreter."""
    name: str = request.param
    request.getfixturevalue("native" if name == "native" else "interpreter")
    return name


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU."""
    name: str = request.param
    if name != "reference":
        request.getfixturevalue("native" if name == "native" else "interpreter")
    return name
