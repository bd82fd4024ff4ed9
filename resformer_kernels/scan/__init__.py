"""Linear recurrences in parallel along time."""

from resformer_kernels.scan.api import linear_scan

__all__ = ["linear_scan"]
