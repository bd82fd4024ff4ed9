"""The backends of the scan that run here."""

from tests.backends import backend, kernels

__all__ = ["backend", "kernels"]
