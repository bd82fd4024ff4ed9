"""Checkpoints of other code bases as a `LanguageModel`.

`from_paper` reads those of the paper's own code (Zhou et al., arXiv 2410.17897), which are Llamas
of transformers: its baseline, its ResFormer (Identity) and its SVFormer. `from_nanochat` reads
those of nanochat, with value embeddings or before them. Both map every weight or raise, naming what
has no counterpart; both give the logits of the code that trained them, up to rounding.

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

nanochat rotates the other way: with the halves of each query and key head exchanged, its scores
are those of a rotation forwards. Its tables are padded to a multiple of 64 tokens; that goes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.models.config import LanguageModelConfig
from resformer_kernels.models.language_model import LanguageModel

# What torch.compile and distributed wrappers put before every name.
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")


def from_paper(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    variant: str | None = None,
    **changes: Any,
) -> LanguageModel:
    """The model of a checkpoint of the paper's code.

    Args:
        state: the state dict, as `safetensors.torch.load_file` or `torch.load` reads it.
        config: what its config.json says, a `LlamaConfig`.
        variant: one of `VARIANTS`; None: "svformer" where only the first layer projects values,
            else "identity", which is the paper's ResFormer. Its baseline has the same weights and
            is "transformer".
        changes: fields of `LanguageModelConfig` to set, such as `max_seqlen` or `backend`.

    Returns:
        The model in float32, in evaluation mode.

    Raises:
        ValueError: a weight that is missing, has another shape or has no counterpart; a config with
            biases, scaled RoPE or another activation than silu.
    """
    weights = _unwrapped(state)
    layers = int(config["num_hidden_layers"])
    alone = not any(
        f"model.layers.{n}.self_attn.v_proj.weight" in weights for n in range(1, layers)
    )
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
    found = {}
    for name in [name for name in weights if not name.endswith("rotary_emb.inv_freq")]:
        found[_llama_name(name)] = weights[name]
    if (
        "head.weight" not in found
        and config.get("tie_word_embeddings")
        and "embedding.weight" in found
    ):
        found["head.weight"] = found["embedding.weight"]
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
    """The model of a nanochat checkpoint.

    Some of what the model computes stands in nanochat's code alone, and has changed. The defaults
    are of the versions that brought value embeddings; look yours up.

    Args:
        state: the state dict, model_*.pt as `torch.load` reads it.
        config: `model_config` of its meta_*.json: sequence_len, vocab_size, n_layer, n_head,
            n_kv_head, n_embd and, where it is there, window_pattern.
        rope_base: of the rotary wavelengths; later versions have 100 000.
        qk_gain: multiplies normalised queries and keys, each; later versions have 1.2.
        gate_range: of the value embeddings' gates; later versions have 3.
        short_window: how far an S layer looks back, in keys; None: half of sequence_len. Later
            versions have a quarter, rounded up to 128.
        logit_softcap: of the logits.
        changes: fields of `LanguageModelConfig` to set, such as `max_seqlen` or `backend`.

    Returns:
        The model in float32, in evaluation mode. Its norms have weights, all of them one.

    Raises:
        ValueError: a weight that is missing, has another shape or has no counterpart, as those of
            the latest versions (`smear_gate`, `smear_lambda`, `backout_lambda`).
    """
    weights = _unwrapped(state)
    layers, length = int(config["n_layer"]), int(config["sequence_len"])
    gates = [weights[name] for name in weights if name.endswith("ve_gate.weight")]
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
        # Its windows count the keys before a query, ours the query's own too.
        "short_window": (length // 2 if short_window is None else short_window) + 1,
        "qk_norm": True,
        "attention_scale": qk_gain**2 * head_dim**-0.5,
        "embedding_norm": True,
        "stream_scales": "resid_lambdas" in weights,
        "logit_softcap": logit_softcap,
        "rope_base": rope_base,
        "gate_channels": gates[0].shape[1] if gates else 32,
        "gate_range": gate_range,
    }
    made = LanguageModelConfig(**{**fields, **changes})
    found = {_nanochat_name(name): tensor for name, tensor in weights.items()}
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


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}


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


_LLAMA = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attention",
}
_NANOCHAT = {
    "attn.c_q": "attention.q_proj",
    "attn.c_k": "attention.k_proj",
    "attn.c_v": "attention.v_proj",
    "attn.c_proj": "attention.o_proj",
    "attn.ve_gate": "attention.v_mix.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_TOP = {
    "model.embed_tokens.weight": "embedding.weight",
    "transformer.wte.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "resid_lambdas": "stream_scale",
    "x0_lambdas": "input_scale",
}


def _llama_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return _TOP.get(name, name)
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    first, _, last = rest.partition(".")
    return f"blocks.{number}.{_LLAMA.get(first, first)}.{last}"


def _nanochat_name(name: str) -> str:
    if name.startswith("value_embeds."):
        return f"blocks.{name.split('.')[1]}.attention.v_mix.table"
    if not name.startswith("transformer.h."):
        return _TOP.get(name, name)
    number, _, rest = name.removeprefix("transformer.h.").partition(".")
    inner = rest.removesuffix(".weight")
    return f"blocks.{number}.{_NANOCHAT.get(inner, inner)}.weight"


def _loaded(config: LanguageModelConfig, found: Mapping[str, Tensor]) -> LanguageModel:
    """The model with these weights, every one of them and no other."""
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
