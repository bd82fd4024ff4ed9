"""Fixtures for the ops whose Triton kernels are quick enough in the interpreter for every test."""

from __future__ import annotations

import pytest
import torch

from resformer_kernels._triton import available as _triton


def available(request: pytest.FixtureRequest) -> str:
    """The backend that is the fixture's parameter; skips where it cannot run here."""
    name: str = request.param
    if name == "native":
        request.getfixturevalue("native")
    elif name == "triton" and (reason := _triton.unavailable_reason(torch.device("cpu"))):
        pytest.skip(reason)
    return name


@pytest.fixture(params=["native", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Each backend that has kernels: compiled ones, and Triton's in its interpreter."""
    return available(request)


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU."""
    return available(request)
