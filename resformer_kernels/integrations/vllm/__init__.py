"""A plugin of vLLM: models with a value residual, and SVFormer's cache of keys and one V.

`register` is an entry point of group `vllm.general_plugins`, which vLLM calls in every process it
starts. Importing this package needs neither vLLM nor transformers.
"""

from __future__ import annotations

import importlib
import logging
import re

LEAST, BELOW = (0, 32), (0, 33)
"""Versions of vLLM that are served: from the first to below the second."""

BACKEND = "RESFORMER"
"""The attention backend's name in vLLM."""
MODELS = {
    f"{kind}{family}ForCausalLM": f"{kind}ForCausalLM"
    for kind in ("ResFormer", "SVFormer")
    for family in ("Llama", "Qwen2")
}
"""From an architecture, as transformers saves it, to the class of `models` that serves it."""

_LOGGER = logging.getLogger(__name__)


def register() -> None:
    """Register the models and the attention backend with vLLM; calling it again changes nothing.

    Raises nothing, because an exception here would end every vLLM on the machine, whatever model it
    serves: a vLLM of another version is named in a warning, and any error is logged.
    """
    try:
        reason = unsupported_reason()
        if reason is None:
            _register()
        else:
            _LOGGER.warning("resformer_kernels registers no models with vLLM: %s", reason)
    except Exception:
        _LOGGER.exception("resformer_kernels could not register its models with vLLM")


def unsupported_reason() -> str | None:
    """Why the installed vLLM is not served; None where it is."""
    found = str(importlib.import_module("vllm").__version__)
    takes = f"it takes vLLM {_text(LEAST)} or newer and below {_text(BELOW)}"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not LEAST <= (int(numbers[1]), int(numbers[2])) < BELOW:
        return f"{takes}, got {found}"
    return None


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _register() -> None:
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND in AttentionBackendEnum.__members__:
        return
    # Its classes of configs are what AutoConfig reads a checkpoint's config with.
    importlib.import_module("resformer_kernels.integrations.transformers")
    register_backend(BACKEND, f"{__name__}.backend.ResFormerBackend")
    for architecture, served_by in MODELS.items():
        ModelRegistry.register_model(architecture, f"{__name__}.models:{served_by}")
