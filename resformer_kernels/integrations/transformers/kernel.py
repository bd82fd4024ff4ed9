"""`attn_implementation="resformer"`: the attention kernel for models of transformers.

The attention function is the kernel alone: its values are already mixed. The model's mask says what
a query may attend to (`masks.py`). Where there is none, `is_causal` does, as with sdpa.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import is_torchdynamo_compiling, logging

from resformer_kernels._core import across
from resformer_kernels._core.gradient import wants_gradient
from resformer_kernels.attention.api import value_residual_attention
from resformer_kernels.integrations.transformers.masks import KeyMask, Window, resformer_mask
from resformer_kernels.integrations.transformers.packed import attend_in_pages, attend_packed
from resformer_kernels.integrations.transformers.support import check_models
from resformer_kernels.integrations.transformers.version import serves_batching
from resformer_kernels.kvcache.api import attention_with_kvcache

NAME = "resformer"

DECODE_ROWS = 8
"""Queries times query heads per KV head up to which `attention_with_kvcache` is used: there reading
the keys dominates, and it is two to five times as fast on a CPU; beyond it is slower."""

_log = logging.get_logger(f"transformers.{NAME}")  # under the verbosity set for transformers


def scoring(
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """The op's options, from those of an attention function of transformers.

    The arguments are those of `resformer_attention`.
    """
    if output_attentions:
        _log.warning_once(
            f"attn_implementation='{NAME}' computes no attention weights, so those of "
            "output_attentions=True are None: set attn_implementation='eager' for them"
        )
    return {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}


def is_causal_without_mask(module: Any, is_causal: bool | None, q_length: int) -> bool:
    """Whether attention without a mask is causal. A single query sees every key."""
    asked = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return q_length > 1 and bool(asked)


def resformer_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the arguments of transformers' attention functions.

    Calls `value_residual_attention`, or `attention_with_kvcache` for few queries outside training
    and compilation. Dropout goes to torch's SDPA.

    Args:
        module: the calling attention module; its `is_causal` is the default.
        query: (B or 1, Hq, Tq, D); read in place, like key and value.
        key: (B, Hkv, Tk, D), not repeated for grouped heads.
        value: (B, Hkv, Tk, Dv).
        attention_mask: what each query may attend to: as `resformer_mask` returns it, or any bool
            or additive mask that broadcasts to (B, Hq, Tq, Tk). None: all keys; or, where
            is_causal, causal order of the first Tq keys.
        is_causal: read where there is no mask.
        position_bias: added to the scores, broadcastable to (B, Hq, Tq, Tk).
        indices: (B, Tq, n) integers, the keys to which a query may attend beside what the mask
            says (DeepSeek's sparse attention); None: all.
        block_indices: (B, heads of the indexer, Tq, n) integers, the same for blocks of keys
            (MiniMax's); the module's `indexer` makes a mask of them.
        kwargs: `scaling`, the factor of q.k; `softcap`; `s_aux`, sinks, (Hq,); `dropout`;
            `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k` for packed
            sequences, with B = 1. As with FlashAttention, packed sequences have no mask, but
            `is_causal` and `sliding_window`, the number of keys that a query sees on either side
            with its own. `cache`, `read_index` and `write_index` of continuous batching.

    Returns:
        (B, Tq, Hq, Dv), and None for the weights; `output_attentions=True` warns once.

    Raises:
        ValueError: dropout together with softcap, sinks or packed sequences, none of which torch's
            SDPA has; or, in continuous batching, anything but causal attention.
        TypeError: `cache` is not continuous batching's.
    """
    options = scoring(**kwargs)
    if across.current() is not None:
        _check_split(module, kwargs)
    packed = kwargs.get("cu_seq_lens_q") is not None
    paged = kwargs.get("cache") is not None
    if paged:
        _check_paged(is_causal, position_bias, indices, block_indices)
    if indices is not None:
        attention_mask = _select(attention_mask, indices, key.shape[2])
    if block_indices is not None:
        positions = kwargs.get("position_ids")
        attention_mask = _select_blocks(module, attention_mask, block_indices, key, positions)
    if kwargs.get("dropout"):
        _check_dropout(kwargs["dropout"], packed, options)
        mask = attention_mask.whole() if isinstance(attention_mask, KeyMask) else attention_mask
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=kwargs["dropout"],
            scaling=options["scale"],
            is_causal=is_causal,
            position_bias=position_bias,
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if paged:
        return attend_in_pages(module, q, k, v, options, kwargs), None
    if packed:
        return attend_packed(module, q, k, v, is_causal, options, kwargs), None
    if q.shape[0] != k.shape[0]:
        batch = max(q.shape[0], k.shape[0])
        q, k, v = (x.expand(batch, -1, -1, -1) for x in (q, k, v))
    causal = is_causal_without_mask(module, is_causal, q.shape[1])
    seen = read_mask(attention_mask, q.shape[1], k.shape[1], causal)
    k, v = k[:, : seen.length], v[:, : seen.length]
    # By their own name the first layer's values are gathered once, for all layers.
    shared = across.current() is not None and not module.projects_values
    return _attend(q, k, v, seen, position_bias, options, shared=shared), None


def _check_split(module: Any, kwargs: dict[str, Any]) -> None:
    """RuntimeError where a call cannot run under `context_parallel`."""
    if not hasattr(module, "v_mix"):
        raise RuntimeError(
            f"{type(module).__name__} cannot run under context_parallel, as its positions are not "
            "this rank's: convert_to_resformer makes a model that can"
        )
    if kwargs.get("dropout"):
        raise RuntimeError(
            f"dropout must be 0 under context_parallel, got {kwargs['dropout']}: it is left to "
            "torch's SDPA, which attends to this rank's tokens alone"
        )


def _select(mask: Tensor | None, indices: Tensor, kv_length: int) -> Tensor:
    """The mask where it allows the keys that `indices` selects."""
    selected = indices.new_zeros((*indices.shape[:2], kv_length), dtype=torch.bool)
    selected = selected.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask is None or mask.dtype is torch.bool:
        return selected if mask is None else selected & mask
    return mask.masked_fill(~selected, torch.finfo(mask.dtype).min)


def _select_blocks(
    module: torch.nn.Module,
    mask: Tensor | None,
    block_indices: Tensor,
    key: Tensor,
    position_ids: Tensor | None,
) -> Tensor:
    """The mask where it allows the blocks of keys that `block_indices` selects, by the model's own
    code for eager and sdpa."""
    q_length, kv_length = block_indices.shape[2], key.shape[2]
    if position_ids is None:
        position_ids = torch.arange(kv_length - q_length, kv_length, device=key.device)
    if position_ids.dim() == 1:
        position_ids = position_ids.unsqueeze(0)
    indexer: Any = module.indexer
    built: Tensor = indexer.build_block_mask(
        block_indices, mask, kv_length, key.dtype, key.device, position_ids
    )
    return built


def _check_paged(
    is_causal: bool | None,
    position_bias: Tensor | None,
    indices: Tensor | None,
    block_indices: Tensor | None,
) -> None:
    if is_causal is False:
        raise ValueError("is_causal must be True in continuous batching, got False")
    others = {"position_bias": position_bias, "indices": indices, "block_indices": block_indices}
    if given := [name for name, value in others.items() if value is not None]:
        raise ValueError(f"{' and '.join(given)} must be None in continuous batching")


def _check_dropout(dropout: float, packed: bool, options: dict[str, Any]) -> None:
    missing = {
        "softcap": options["softcap"],
        "sinks (s_aux)": options["sinks"] is not None,
        "packed sequences": packed,
    }
    for name, given in missing.items():
        if given:
            raise ValueError(
                f"attn_implementation='{NAME}' leaves dropout to torch's SDPA, which has no "
                f"{name}; got dropout {dropout}: set config.attention_dropout to 0"
            )


class Seen(NamedTuple):
    """What queries may attend to, in the op's terms."""

    window: Window
    keys: Tensor | None
    """(B or 1, count) bool, True where a key may be attended to; None: all."""
    bias: Tensor | None
    """Any other mask, bool or additive."""
    length: int
    """Keys, from the first on, that are looked at."""


def read_mask(mask: Tensor | None, q_length: int, kv_length: int, causal: bool) -> Seen:
    """What a mask of transformers says; `causal` says what its absence means."""
    if mask is None and causal and kv_length < q_length:
        mask = torch.ones(q_length, kv_length, dtype=torch.bool).tril()
    if mask is None:
        # As with sdpa, without a mask query i is key i's, and a static cache's later keys unused.
        return Seen((-1, 0 if causal else -1), None, None, q_length if causal else kv_length)
    if isinstance(mask, KeyMask):
        if mask.shape[2:] == (q_length, kv_length):
            return Seen(mask.window, mask.keys if mask.padded else None, None, mask.keys.shape[1])
        mask = mask.whole()
    if mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, 1):
        return Seen((-1, -1), mask[:, 0, 0].expand(-1, kv_length), None, kv_length)
    return Seen((-1, -1), None, mask, kv_length)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    position_bias: Tensor | None,
    options: dict[str, Any],
    *,
    shared: bool,
) -> Tensor:
    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    by_key = seen.bias is None and position_bias is None
    # A compiler treats that op as writing to its caches and might copy them.
    elsewhere = is_torchdynamo_compiling() or wants_gradient((q, k, v, options["sinks"]))
    elsewhere = elsewhere or across.current() is not None
    if by_key and rows <= DECODE_ROWS and not elsewhere:
        mask = None if seen.keys is None else seen.keys.expand(q.shape[0], -1)
        decoded: Tensor = attention_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=k.shape[1],
            key_mask=mask,
            causal=False,
            window=seen.window,
            **options,
        )
        return decoded
    bias = seen.bias if seen.keys is None else seen.keys[:, None, None]
    if position_bias is not None:
        bias = _add_masked(position_bias[..., : seen.length], bias)
    if bias is not None and bias.is_floating_point() and bias.dtype != q.dtype:
        bias = bias.float()
    values = (None, v) if shared else (v, None)
    out: Tensor = value_residual_attention(
        q, k, *values, attn_bias=bias, window=seen.window, **options
    )
    return out


def _add_masked(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias and a mask as one bias."""
    if mask is None:
        return position_bias
    if mask.dtype is torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask


def register() -> None:
    """Register `attn_implementation="resformer"` and its mask function, for the models that can be
    served."""
    AttentionInterface.register(NAME, resformer_attention)
    AttentionMaskInterface.register(NAME, resformer_mask)
    check_models(NAME)
    if serves_batching():
        import_module("resformer_kernels.integrations.transformers.batching").register(NAME)
