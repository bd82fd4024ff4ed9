"""Settings that every test shares."""

from __future__ import annotations

import os

import torch


def pytest_configure() -> None:
    """Give each parallel worker one thread: two workers of two threads each only wait."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
