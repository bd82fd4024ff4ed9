"""Value residuals in models of Hugging Face transformers 5.17 or newer.

Importing this package registers the classes with transformers' Auto classes, and
`attn_implementation="resformer"`. `import resformer_kernels` does neither.
"""

from __future__ import annotations

import importlib.metadata

_NEEDED = (5, 17)


def _check_version() -> None:
    advice = "pip install 'resformer-kernels[transformers]'"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"resformer_kernels.integrations.transformers needs transformers: {advice}"
        ) from None
    if tuple(int(part) for part in version.split(".")[:2]) < _NEEDED:
        raise ImportError(
            "resformer_kernels.integrations.transformers needs transformers "
            f"{'.'.join(map(str, _NEEDED))} or newer, got {version}: {advice}"
        )


_check_version()

from resformer_kernels.integrations.transformers import families, kernel  # noqa: E402
from resformer_kernels.integrations.transformers.cache import ResFormerCache  # noqa: E402
from resformer_kernels.integrations.transformers.convert import convert_to_resformer  # noqa: E402

kernel.register()

__all__ = [
    "ResFormerCache",
    "convert_to_resformer",
    "families",
]
