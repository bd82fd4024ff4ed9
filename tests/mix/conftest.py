"""The backends of the mixing ops that run here."""

from tests.backends import backend, kernels

__all__ = ["backend", "kernels"]
