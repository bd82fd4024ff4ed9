"""Nonlinear reservoirs: a leaky recurrence with fixed or learned weights, parallel along time."""

from resformer_kernels.reservoir.api import reservoir_scan
from resformer_kernels.reservoir.record import ReservoirInfo, RingWeight

__all__ = ["ReservoirInfo", "RingWeight", "reservoir_scan"]
