"""The GPU's part: `resformer-kernels device-check`, and what `tune` shares with it."""
