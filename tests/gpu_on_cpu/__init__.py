"""An executor of PTX: what Triton and nvcc compile runs on the CPU, and is watched meanwhile."""
