"""Tiny models of transformers for tests."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip(
    "transformers", reason="needs transformers (pip install 'resformer-kernels[transformers]')"
)

from resformer_kernels.integrations import transformers as integration  # noqa: E402
from resformer_kernels.integrations.transformers import (  # noqa: E402
    ResFormerCache,
    convert_to_resformer,
    families,
    kernel,
    version,
)
from resformer_kernels.integrations.transformers import masks as mask_forms  # noqa: E402
from resformer_kernels.integrations.transformers.config import build_value_mix  # noqa: E402
from resformer_kernels.integrations.transformers.packed import block_table  # noqa: E402

# Tests import these from here, so that they are skipped where transformers is not installed.
__all__ = [
    "DECODERS",
    "FAMILIES",
    "QUIET",
    "ResFormerCache",
    "attention_layers",
    "block_table",
    "build_value_mix",
    "causal",
    "convert_to_resformer",
    "converted",
    "families",
    "generate",
    "integration",
    "kernel",
    "left_padded",
    "logits",
    "mask_forms",
    "state",
    "stock",
    "tokens",
    "transformers",
    "two_sided",
    "version",
]

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# transformers uses its own deprecated functions.
QUIET = (
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
)

DECODERS = ("Llama", "Qwen2")
FAMILIES = (*DECODERS, "ModernBert")
_SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    # Large enough that rounding does not change greedy choices.
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def stock(family: str, head: str | None = None, **changes: Any) -> Any:
    """A random model of a family, in evaluation mode, with the head of its usual task."""
    extra: dict[str, Any] = {"num_key_value_heads": 2}
    if family == "ModernBert":
        extra = {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
    suffix = head or ("ForMaskedLM" if family == "ModernBert" else "ForCausalLM")
    config = getattr(transformers, f"{family}Config")(**{**_SIZE, **extra, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{family}{suffix}")(config).eval()


def converted(family: str, variant: str = "learnable", **options: Any) -> Any:
    """The same model with a value residual whose learned coefficients differ."""
    model = convert_to_resformer(stock(family), variant, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".v_mix." in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def attention_layers(model: Any) -> list[Any]:
    """The attention module of every layer, stock or converted."""
    return [getattr(layer, "self_attn", None) or layer.attn for layer in model.base_model.layers]


def state(model: nn.Module) -> list[Any]:
    """The class of every module and the identity of all that it holds, also in its dicts."""

    def held(value: Any) -> Any:
        inner = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else None
        return id(value), inner

    return [(type(m), [(k, held(v)) for k, v in vars(m).items()]) for m in model.modules()]


def tokens(batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    """(batch, length) token ids that are neither padding nor special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (batch, length), generator=generator)


def logits(model: Any) -> Tensor:
    """Those of `tokens()`, without gradients."""
    with torch.no_grad():
        found: Tensor = model(tokens()).logits
    return found


def left_padded(length: int = 11, padding: int = 4) -> dict[str, Tensor]:
    """Two prompts, the second shorter by `padding`."""
    ids = tokens(length=length)
    ids[1, :padding] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """The prompt and 8 tokens, greedily."""
    found: Tensor = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    return found


def causal(window: int | None = None) -> Any:
    """The mask function of causal order, or of a window that includes the query's own key."""
    if window is None:
        return transformers.masking_utils.causal_mask_function
    return transformers.masking_utils.sliding_window_causal_mask_function(window)


def two_sided(window: int | None = None) -> Any:
    """The mask function of all keys, or of a window on both sides of the query's own key."""
    if window is None:
        return transformers.masking_utils.bidirectional_mask_function
    return transformers.masking_utils.sliding_window_bidirectional_mask_function(window)
