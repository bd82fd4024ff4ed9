"""Value residuals in models of Hugging Face transformers 5.17 or newer.

Importing this package registers the classes with transformers' Auto classes, and
`attn_implementation="resformer"`. `import resformer_kernels` does neither.
"""

from __future__ import annotations

from resformer_kernels.integrations.transformers.version import installed

installed()

from resformer_kernels.integrations.transformers import families, kernel  # noqa: E402
from resformer_kernels.integrations.transformers.cache import ResFormerCache  # noqa: E402
from resformer_kernels.integrations.transformers.convert import convert_to_resformer  # noqa: E402

kernel.register()

__all__ = [
    "ResFormerCache",
    "convert_to_resformer",
    "families",
]
