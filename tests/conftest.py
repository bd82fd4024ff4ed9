"""Settings that every test shares."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# A first call loads the library, and CI machines stall: time per example says nothing here. CI
# draws the same examples every time, so that a failure there can be repeated.
settings.register_profile(
    "house", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True
)
settings.load_profile("house")


def pytest_configure() -> None:
    """Give each parallel worker one thread: two workers of two threads each only wait."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
