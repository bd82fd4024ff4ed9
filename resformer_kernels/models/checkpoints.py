"""Load checkpoints of other code bases as a `LanguageModel`.

`from_paper` reads checkpoints of the paper's own code (Zhou et al., arXiv 2410.17897), which are
Llamas of transformers: its baseline, its ResFormer (Identity) and its SVFormer. `from_nanochat`
reads checkpoints of nanochat, with or without value embeddings. Both map every weight or raise an
error that names the weights without a counterpart. Logits equal those of the code that trained the
checkpoint, up to rounding.

| here | the paper's | nanochat's |
| --- | --- | --- |
| embedding, head | model.embed_tokens, lm_head | transformer.wte, lm_head |
| norm | model.norm | ones |
| stream_scale, input_scale | | resid_lambdas, x0_lambdas |
| blocks.N. | model.layers.N. | transformer.h.N. |
| attention_norm, mlp_norm | input_layernorm, post_attention_layernorm | ones |
| attention.{q,k,v,o}_proj | self_attn.{q,k,v,o}_proj | attn.c_{q,k,v,proj} |
| attention.v_mix.gate_proj | | attn.ve_gate |
| attention.v_mix.table | | value_embeds.N, at the top |
| mlp.{gate,up,down}_proj | mlp.{gate,up,down}_proj | mlp.c_fc, mlp.c_proj (no gate) |

nanochat rotates in the opposite direction: exchanging the halves of each query and key head gives
the same scores under a forward rotation. Its tables are padded to a multiple of 64 tokens; the
padding is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.models.config import LanguageModelConfig
from resformer_kernels.models.language_model import LanguageModel

# Prefixes that torch.compile and distributed wrappers add to every name.
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")


def from_paper(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    variant: str | None = None,
    **changes: Any,
) -> LanguageModel:
    """Load a checkpoint of the paper's code.

    Args:
        state: the state dict, as `safetensors.torch.load_file` or `torch.load` returns it.
        config: the contents of its config.json, a `LlamaConfig`.
        variant: one of `VARIANTS`. None: "svformer" where only the first layer projects values,
            else "identity", the paper's ResFormer. The paper's baseline has the same weights as
            that; for it pass "transformer".
        changes: fields of `LanguageModelConfig` to set, such as `max_seqlen` or `backend`.

    Returns:
        The model in float32, in evaluation mode.

    Raises:
        ValueError: a weight is missing, has the wrong shape or has no counterpart; or config has
            biases, scaled RoPE or an activation other than silu.
    """
    found = _renamed(state, _PAPER)
    found = {name: x for name, x in found.items() if not name.endswith("rotary_emb.inv_freq")}
    layers = int(config["num_hidden_layers"])
    alone = not any(f"blocks.{n}.attention.v_proj.weight" in found for n in range(1, layers))
    _require_llama(config)
    rope = config.get("rope_parameters") or config
    fields: dict[str, Any] = {
        "variant": variant or ("svformer" if alone and layers > 1 else "identity"),
        "vocab_size": config["vocab_size"],
        "max_seqlen": config["max_position_embeddings"],
        "dim": config["hidden_size"],
        "num_layers": layers,
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "mlp_hidden": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_base": rope.get("rope_theta", 10_000.0),
    }
    if config.get("tie_word_embeddings") and "embedding.weight" in found:
        found.setdefault("head.weight", found["embedding.weight"])
    return _loaded(LanguageModelConfig(**{**fields, **changes}), found)


def from_nanochat(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    rope_base: float = 10_000.0,
    qk_gain: float = 1.0,
    gate_range: float = 2.0,
    short_window: int | None = None,
    logit_softcap: float = 15.0,
    **changes: Any,
) -> LanguageModel:
    """Load a nanochat checkpoint.

    Some constants of the model are in nanochat's code alone, and differ between its versions. The
    defaults are those of the versions that introduced value embeddings; look up yours.

    Args:
        state: the state dict, model_*.pt as `torch.load` returns it.
        config: `model_config` of its meta_*.json: sequence_len, vocab_size, n_layer, n_head,
            n_kv_head, n_embd and optionally window_pattern.
        rope_base: base of the rotary wavelengths; 100 000 in later versions.
        qk_gain: factor of the normalised queries and of the keys; 1.2 in later versions.
        gate_range: upper end of the value embeddings' gates; 3 in later versions.
        short_window: keys before the query that an S layer sees; None: half of sequence_len. Later
            versions use a quarter, rounded up to a multiple of 128.
        logit_softcap: logits become c tanh(logits / c).
        changes: fields of `LanguageModelConfig` to set, such as `max_seqlen` or `backend`.

    Returns:
        The model in float32, in evaluation mode. All weights of its norms are one.

    Raises:
        ValueError: a weight is missing, has the wrong shape or has no counterpart, such as
            `smear_gate`, `smear_lambda` and `backout_lambda` of the latest versions.
    """
    found = _renamed(state, _NANOCHAT)
    layers, length = int(config["n_layer"]), int(config["sequence_len"])
    gates = [x for name, x in found.items() if name.endswith("v_mix.gate_proj.weight")]
    head_dim = config["n_embd"] // config["n_head"]
    fields: dict[str, Any] = {
        "variant": "value-embedding" if gates else "transformer",
        "vocab_size": config["vocab_size"],
        "max_seqlen": length,
        "dim": config["n_embd"],
        "num_layers": layers,
        "num_heads": config["n_head"],
        "num_kv_heads": config["n_kv_head"],
        "mlp": "relu2",
        "mlp_hidden": 4 * config["n_embd"],
        "window_pattern": config.get("window_pattern", "L").upper(),
        # nanochat's windows count the keys before the query; ours include the query's own.
        "short_window": (length // 2 if short_window is None else short_window) + 1,
        "qk_norm": True,
        "attention_scale": qk_gain**2 * head_dim**-0.5,
        "embedding_norm": True,
        "stream_scales": "stream_scale" in found,
        "logit_softcap": logit_softcap,
        "rope_base": rope_base,
        "gate_channels": gates[0].shape[1] if gates else 32,
        "gate_range": gate_range,
    }
    made = LanguageModelConfig(**{**fields, **changes})
    for name, tensor in found.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            found[name] = tensor.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)
        elif name.endswith("v_mix.table"):
            found[name] = tensor[: made.vocab_size].unflatten(1, (-1, head_dim))
        elif name in ("embedding.weight", "head.weight"):
            found[name] = tensor[: made.vocab_size]
    norms = [f"blocks.{n}.{norm}" for n in range(layers) for norm in ("attention_norm", "mlp_norm")]
    for name in (*norms, "norm"):
        found[f"{name}.weight"] = torch.ones(made.dim)
    return _loaded(made, found)


def _require_llama(config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    wanted = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(config.get("attention_bias", False)), False),
        "mlp_bias": (bool(config.get("mlp_bias", False)), False),
        "rope_type": (kind, "default"),
    }
    for name, (value, only) in wanted.items():
        if value != only:
            raise ValueError(f"config: {name} must be {only!r}, got {value!r}")


_PAPER = {
    r"model\.layers": "blocks",
    r"model\.embed_tokens": "embedding",
    r"model\.norm": "norm",
    r"lm_head": "head",
    r"input_layernorm": "attention_norm",
    r"post_attention_layernorm": "mlp_norm",
    r"self_attn": "attention",
}
_NANOCHAT = {
    r"value_embeds\.(\d+)\.weight": r"blocks.\1.attention.v_mix.table",
    r"transformer\.h": "blocks",
    r"transformer\.wte": "embedding",
    r"lm_head": "head",
    r"resid_lambdas": "stream_scale",
    r"x0_lambdas": "input_scale",
    r"attn\.c_([qkv])": r"attention.\1_proj",
    r"attn\.c_proj": "attention.o_proj",
    r"attn\.ve_gate": "attention.v_mix.gate_proj",
    r"mlp\.c_fc": "mlp.up_proj",
    r"mlp\.c_proj": "mlp.down_proj",
}
"""Patterns of whole parts of a weight's name, and what replaces them."""


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        name = _WRAPPERS.sub("", name)
        for pattern, ours in names.items():
            name = re.sub(rf"(?<![\w]){pattern}(?!\w)", ours, name)
        renamed[name] = tensor
    return renamed


def _loaded(config: LanguageModelConfig, found: Mapping[str, Tensor]) -> LanguageModel:
    """The model with exactly these weights."""
    with torch.device("meta"):
        model = LanguageModel(config)
    wanted = model.state_dict()
    missing, strange = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or strange:
        raise ValueError(
            f"state does not hold a {config.variant} of {config.num_layers} layers: missing "
            f"{', '.join(missing) or 'none'}; without counterpart {', '.join(strange) or 'none'}"
        )
    for name, tensor in wanted.items():
        if tuple(found[name].shape) != tuple(tensor.shape):
            raise ValueError(
                f"state: {name} must be {tuple(tensor.shape)}, got {tuple(found[name].shape)}"
            )
    model = LanguageModel(config)
    model.load_state_dict({name: found[name] for name in wanted})
    return model.eval()
