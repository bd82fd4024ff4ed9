"""The compile check: every Triton kernel, compiled for GPUs that need not be present."""
