"""Tiny configurations of every family of transformers, by the names of their fields."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from tests.families.overrides import CONFIGS
from tests.integrations.tiny import transformers

WIDTH, HEADS, HEAD_DIM, INNER, LAYERS, VOCAB = 64, 4, 16, 96, 2, 96
IMAGE, PATCH, WINDOW, POSITIONS = 64, 16, 4, 128
FIRST_SPECIAL = 64
"""Token ids from here to VOCAB - 1 are those of images, audio, videos and their ends."""

auto = transformers.models.auto.configuration_auto

_RULES: tuple[tuple[str, Any], ...] = (
    # Sizes of heads, before those of models, which end alike.
    (r"(qk_nope|v|linear_key|linear_value|linear|swa|swa_v|index|global)_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim|rope_head_dim", lambda found: min(found, HEAD_DIM)),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"(resampler_|attention_|decoder_)?head_dim|d_kv|d_head|dim_head|kv_channels", HEAD_DIM),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank", 16),
    (r"(\w+_)?(num_key_value_heads|n_kv_heads?|num_kv_heads|kv_n_heads|multi_query_group_num)", 2),
    (r"(\w+_)?(num_)?(\w+_)?(attention_heads|n_heads?|num_heads|heads|nhead)", HEADS),
    (r"mamba_n_groups|n_groups|num_groups", 1),
    (r"n_group|topk_group", 1),
    (r"index_topk|indexer_budget", WINDOW),
    (r"num_position_embeddings", 64),
    (r"mm_tokens_per_image", 4),
    (r"num_filters|mamba_d_state|state_size|upsample_initial_channel|part_features", 16),
    (r"ngram_vocab_size_base|encoder_hash_byte_group_vocab", 64),
    # Lengths.
    (r"max_source_positions", 32),
    (r"(\w*max_position_embeddings|n_positions|n_ctx|max_\w*seq_len\w*|\w*_positions)", POSITIONS),
    (r"(sliding_window|sliding_window_size|attention_window_size)", WINDOW),
    (r"(attention_chunk_size|local_attention)", 2 * WINDOW),
    (r"(num_)?mel_bins", 16),
    (r"base_channels", 32),
    # Numbers of things.
    (r"(num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|top_k_experts)", 2),
    (
        r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts|"
        r"\w*_num_experts|num_routed_experts)",
        4,
    ),
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts|first_k_dense_replace)", 1),
    (
        r"(?!num_encoder_blocks)(\w+_)?(num_(\w+_)?)?(hidden_layers|layers|n_layers?|depth|blocks)",
        lambda found: min(found, LAYERS),
    ),
    (r"num_queries|num_query_tokens|num_latents|\w*n_latents|latent_query_num", 6),
    (r"(\w+_)?vocab_size(_per_layer_input)?", VOCAB),
    (r"type_vocab_size", 2),
    # Sizes of models.
    (
        r"(\w+_)?(intermediate_size|intermediate_dim|ffn_dim|d_ff|n_inner|dim_ff|mlp_dim|"
        r"ffn_hidden_size|feedforward_dim|dim_feedforward|d_inner|inner_size|ff_dim)",
        INNER,
    ),
    (
        r"(\w+_)?(hidden_size|hidden_dim|hidden_channels|d_model|n_embd|n_embed|embed_dim|"
        r"embedding_dim|embedding_size|emb_dim|dim_model|projection_dim|proj_dim|output_dim|"
        r"hidden_size_global|projection_size|hidden_feat_size|output_size|proj_size|embed_size|"
        r"quantization_dim|codevector_dim|latent_channels|d_latents|adapter_in_dim|"
        r"adapter_input_size|adapter_out_dim|condition_dim)|dim|width",
        WIDTH,
    ),
    (r"hidden_size_per_layer_input|embedding_rank", 8),
    # Images.
    (r"(\w+_)?(image_size|img_size|crop_size)", IMAGE),
    (r"(\w+_)?patch_size", lambda found: PATCH if found >= 8 else found),
    # In pixels, or in the patches of a last stage of 2 x 2.
    (r"window_size", lambda found: 2 * PATCH if found >= 100 else 2),
)

_NO_CHANCE = re.compile(
    r"dropout|drop_rate|drop_path|droppath|layerdrop|pdrop|drop_prob|drop_connect|jitter|"
    r"mask_time_prob|mask_feature_prob|dropconnect|proj_drop|attn_drop"
)
_WIDTHS = re.compile(r"(hidden_sizes|embed_dims?|dims|conv_dim|hidden_dims|tdnn_dim)$")
_REPEATS = re.compile(r"(depths?|num_blocks|num_block_repeats|layer_repeats)$")
_DERIVED = (
    *("num_key_value_heads", "num_kv_heads", "sliding_window", "num_experts_per_tok"),
    *("vocab_size", "head_dim", "n_group", "topk_group"),
)
"""Fields without a value that get one."""

_SPREAD = re.compile(r"initializer_range|init_std")
_SIZES = tuple((re.compile(pattern), value) for pattern, value in _RULES)


def _scaled(widths: Any) -> list[int]:
    """Widths of stages, divided by the largest power of two that keeps eight channels."""
    divisor = 1
    while min(widths) % (2 * divisor) == 0 and min(widths) // (2 * divisor) >= 8:
        divisor *= 2
    return [width // divisor for width in widths]


def _small(name: str, default: Any) -> Any:
    """The tiny value of a field that has a default; the default itself where no rule knows it."""
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    if _NO_CHANCE.search(name):
        if number:
            return type(default)(0)
        if isinstance(default, (list, tuple)):
            return type(default)(0.0 for _ in default)
    if isinstance(default, (list, tuple)) and default and all(type(x) is int for x in default):
        if _WIDTHS.search(name):
            return type(default)(_scaled(default))
        if _REPEATS.search(name):
            return type(default)(1 for _ in default)
    if number and _SPREAD.fullmatch(name):
        return 0.3
    if type(default) is int:
        for pattern, value in _SIZES:
            if pattern.fullmatch(name):
                return value(default) if callable(value) else value
    return default


def _is_special(name: str, value: Any) -> bool:
    ends = ("_token_id", "_token_index", "_token", "_id", "_token_ids", "_index")
    return name.endswith(ends) and type(value) is int and value >= FIRST_SPECIAL


class _Specials:
    """Numbers of special tokens, the same for a name wherever it occurs."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        key = name.replace("_index", "_id")
        return self.numbers.setdefault(key, FIRST_SPECIAL + len(self.numbers) % 30)


def _kinds(config: Any, name: str) -> list[str]:
    """The kinds of layer in a configuration of the usual size, each once."""
    kinds = getattr(config, name, None)
    return list(dict.fromkeys(kinds)) if kinds else []


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _default_of(cls: Any, name: str) -> Any:
    return next((_default(x) for x in dataclasses.fields(cls) if x.name == name), None)


def _fields(cls: Any, given: dict[str, Any], specials: _Specials) -> dict[str, Any]:
    """The arguments of a tiny configuration, without its parts."""
    known = {field.name for field in dataclasses.fields(cls)}
    found = {name: _small(name, x) for name, x in given.items() if name not in known}
    for field in dataclasses.fields(cls):
        name, default = field.name, given.get(field.name, _default(field))
        optional = default is None and "int" in str(field.type)
        if optional and name in _DERIVED:
            default = 1
        value = _small(name, default)
        if _is_special(name, value):
            value = specials.number(name)
        if name in given or value is not default:
            found[name] = value
    if "kv_lora_rank" in found and "num_key_value_heads" in found:
        found["num_key_value_heads"] = HEADS
    if (
        isinstance(_default_of(cls, "num_heads"), (list, tuple))
        and type(found.get("embed_dim")) is int
    ):
        found["embed_dim"] = 8 * _default_of(cls, "num_heads")[0]
    if "pad_token_id" in found:
        found["pad_token_id"] = 0
    return found


def _layers(cls: Any) -> dict[str, Any]:
    """One layer of every kind that a configuration of the usual size has, and at least two."""
    names = {field.name for field in dataclasses.fields(cls)}
    found: dict[str, Any] = {}
    if "use_sliding_window" in names:
        found = {"use_sliding_window": True, "max_window_layers": 1}
    typed = [x for x in ("layer_types", "mlp_layer_types", "layers_block_type") if x in names]
    if not typed:
        return found
    usual = cls(**found)
    kinds = {name: _kinds(usual, name) for name in typed}
    count = max([LAYERS, *map(len, kinds.values())])
    for name, found_kinds in kinds.items():
        if found_kinds:
            found[name] = [found_kinds[i % len(found_kinds)] for i in range(count)]
    if any(kinds.values()) and "num_hidden_layers" in names:
        found["num_hidden_layers"] = count
    return found


def _part(spec: Any, changes: dict[str, Any], specials: _Specials) -> Any:
    """A tiny configuration of a part, such as the text model of a multimodal one."""
    family = changes.pop("model_type", None)
    cls = spec.config_class
    if family or not issubclass(cls, transformers.PreTrainedConfig):
        family = family or spec.model_type
        cls = auto.CONFIG_MAPPING[family]
    given = dict(spec.init_kwargs) if family in (None, spec.model_type) else {}
    stages = given.get("out_indices") or given.get("out_features")
    if (
        stages
        and _default_of(cls, "num_hidden_layers") is not None
        and "out_indices" not in changes
    ):
        given.pop("out_features", None)
        changes |= {"num_hidden_layers": max(LAYERS, len(stages))}
        changes["out_indices"] = list(range(1, len(stages) + 1))
    return tiny(cls, {**given}, changes, specials, family or cls.model_type)


def tiny(
    cls: Any,
    given: dict[str, Any],
    changes: dict[str, Any],
    specials: _Specials,
    family: str,
) -> Any:
    """A tiny configuration of a class.

    given: what its owner passes it; made tiny too. changes: what is kept as it is, with those of
    parts under the part's name.
    """
    # A copy, as a configuration keeps and changes what it is given.
    changes = {**copy.deepcopy(CONFIGS.get(family, {})), **changes}
    found = _fields(cls, given, specials)
    found.update(_layers(cls))
    parts = cls.sub_configs_defaults
    for key, spec in parts.items():
        if key in changes and changes[key] is None:
            continue
        if spec.optional and key not in changes:
            continue
        found[key] = _part(spec, dict(changes.pop(key, {})), specials)
    found.update(changes)
    config = cls(**found)
    _divide_rotations(config)
    return config


def _divide_rotations(config: Any) -> None:
    """Give the axes of a multi-axis rotary embedding parts of a tiny head."""
    if "mrope_section" not in getattr(config, "ignore_keys_at_rope_validation", ()):
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters or {}
    for part in [rope, *(x for x in rope.values() if isinstance(x, dict))]:
        half = int(width * (part.get("partial_rotary_factor") or 1)) // 2
        if sum(part.get("mrope_section") or ()) != half:
            part["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def tiny_config(family: str, **changes: Any) -> Any:
    """The tiny configuration of a family, by its model_type."""
    return tiny(auto.CONFIG_MAPPING[family], {}, changes, _Specials(), family)
