"""Which versions of transformers are served."""

from __future__ import annotations

import importlib.metadata

NEEDED = (5, 17)

BATCHING = (5, 19), (5, 24)
"""Versions, from and before, whose continuous batching `batching.py` knows. Others keep its pages
in another way, and refuse the implementation by a message of their own."""


def installed() -> tuple[int, int]:
    """Major and minor version; ImportError where transformers is missing or too old."""
    advice = "pip install 'resformer-kernels[transformers]'"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"resformer_kernels.integrations.transformers needs transformers: {advice}"
        ) from None
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < NEEDED:
        raise ImportError(
            "resformer_kernels.integrations.transformers needs transformers "
            f"{'.'.join(map(str, NEEDED))} or newer, got {version}: {advice}"
        )
    return major, minor


def serves_batching() -> bool:
    """Whether continuous batching is served with the transformers that is installed."""
    first, after = BATCHING
    return first <= installed() < after
