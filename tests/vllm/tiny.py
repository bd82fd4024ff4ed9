"""Tiny value-residual models with random weights, and what transformers generates with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from resformer_kernels.integrations.transformers import convert_to_resformer

LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 32
WINDOW = 48
PROMPTS = (4, 1, 33, 130, 200, 17)
"""Lengths: those of 130 and 200 fill a page of vLLM's, which a second request finds again."""
NEW_TOKENS = 32

_SLIDES = {"use_sliding_window": True, "sliding_window": WINDOW}


@dataclass(frozen=True)
class Tiny:
    """A model: its family, variant (None: the stock model) and what differs from the others."""

    family: str = "llama"
    variant: str | None = None
    layers: tuple[int, ...] | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """The model in float32, with coefficients and biases that are not their initial values."""
        torch.manual_seed(0)
        config_class, model_class = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        }[self.family]
        sizes: dict[str, Any] = {
            "vocab_size": 256,
            "hidden_size": 4 * HEAD_DIM,
            "intermediate_size": 192,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": self.family == "qwen2",
            "initializer_range": 0.12,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        model = model_class(config_class(**{**sizes, **self.config})).float().eval()
        if self.variant is not None:
            model = convert_to_resformer(model, self.variant, self.layers)
        for name, parameter in model.named_parameters():
            if "v_mix" in name or name.endswith("bias"):
                with torch.no_grad():
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
        return model


MODELS = {
    "llama": Tiny(),
    "svformer": Tiny(variant="svformer"),
    "svformer of two layers": Tiny(variant="svformer", layers=(2, 3)),
    "svformer of Qwen2": Tiny("qwen2", "svformer"),
    "svformer with a window": Tiny("qwen2", "svformer", None, {**_SLIDES, "max_window_layers": 0}),
    "svformer with one KV head": Tiny(
        variant="svformer", config={"num_key_value_heads": 1, "attention_bias": True}
    ),
    "svformer, sliding and full": Tiny(
        "qwen2", "svformer", None, {**_SLIDES, "max_window_layers": 2}
    ),
    "identity": Tiny(variant="identity"),
    "constant": Tiny(variant="constant"),
    "sparse": Tiny(variant="sparse"),
    "learnable": Tiny(variant="learnable"),
    "learnable-plus": Tiny(variant="learnable-plus"),
    "learnable-plus of Qwen2": Tiny("qwen2", "learnable-plus"),
    "learnable, sliding and full": Tiny(
        "qwen2", "learnable", None, {**_SLIDES, "max_window_layers": 2}
    ),
    "dense": Tiny(variant="dense"),
}


@dataclass(frozen=True)
class Saved:
    """A folder with a saved model, and the tokens that transformers appends to each prompt."""

    folder: Path
    tokens: list[list[int]]


def prompts() -> list[list[int]]:
    """Random tokens, the same every time."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 256, (n,), generator=generator).tolist() for n in PROMPTS]


def _generate(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        use_cache=False,
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        eos_token_id=None,
    )
    appended: list[int] = out[0, len(prompt) :].tolist()
    return appended


def save_all(folder: Path) -> dict[str, Saved]:
    """Save every model of `MODELS` under `folder`."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    saved = {}
    for name, tiny in MODELS.items():
        model = tiny.build()
        path = folder / name.replace(" ", "_").replace(",", "")
        model.save_pretrained(path)
        saved[name] = Saved(path, [_generate(model, prompt) for prompt in prompts()])
    return saved
