"""`attn_implementation="resformer"`: the attention kernel for any model of transformers.

The attention function is the kernel alone: its values are already mixed. It has a mask function of
its own; without one transformers would pass no mask and ignore padding. A mask has one of three
forms:

    None        no mask beyond the module's causal order and window
    (B, n)      True where a key may be attended to, in addition to causal order and window. Keys
                after n are unused slots of a static cache
    (B or 1, 1, Tq, Tk)   the whole mask, including causal order and window; for custom masks

Causal order and window are the module's, as with FlashAttention: `is_causal`, `sliding_window`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.utils import is_torchdynamo_compiling
from transformers.utils.import_utils import is_tracing

from resformer_kernels._core.gradient import wants_gradient
from resformer_kernels.attention.api import (
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.kvcache.api import attention_with_kvcache

NAME = "resformer"

DECODE_ROWS = 8
"""Queries times query heads per KV head up to which `attention_with_kvcache` is used: there reading
the keys dominates, and it is two to five times as fast on a CPU; beyond it is slower."""


def _parts(function: Any) -> tuple[Any, ...]:
    """The code objects of a mask function and its closures, without the numbers they hold."""
    cells = function.__closure__ or ()
    inner = [cell.cell_contents for cell in cells]
    flat = [x for item in inner for x in (item if isinstance(item, tuple) else (item,))]
    return (function.__code__, *(_parts(x) for x in flat if hasattr(x, "__code__")))


_WINDOWED = (
    _parts(sliding_window_causal_mask_function(1)),
    _parts(sliding_window_bidirectional_mask_function(1)),
)


def _says_what_the_module_says(function: Any) -> bool:
    """Whether a mask function masks by `is_causal` and `sliding_window` alone."""
    if function is causal_mask_function or function is bidirectional_mask_function:
        return True
    # A compiler cannot inspect closures, so under it a window's mask is made in full.
    return not is_torchdynamo_compiling() and _parts(function) in _WINDOWED


def resformer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask of a forward pass, in its smallest form.

    The arguments are those of every mask function of transformers: queries start at position
    q_offset, keys at kv_offset, and attention_mask is bool, (B, all tokens so far). Where neither
    skip is allowed the mask is made in full.
    """
    seen = None
    may_skip = allow_is_causal_skip or allow_is_bidirectional_skip
    if may_skip and not use_vmap and _says_what_the_module_says(mask_function):
        seen = _keys_so_far(q_length, q_offset, kv_offset)
    padding = attention_mask
    known = padding is None or (seen is not None and padding.shape[-1] >= kv_offset + seen)
    if seen is None or seen > kv_length or not known:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + seen]
        if not is_tracing(padding) and bool(padding.all()):
            padding = None
    if padding is None and seen < kv_length:
        return torch.ones((batch_size, seen), dtype=torch.bool, device=device)
    return padding


def _keys_so_far(q_length: int, q_offset: int | Tensor, kv_offset: int) -> int | None:
    """Number of keys, including the new ones; None where it cannot be read."""
    if isinstance(q_offset, Tensor):
        # A static cache holds its length on the device. Reading it costs one synchronisation, which
        # a long prompt outweighs; for single tokens transformers allows no skip.
        if is_tracing(q_offset):
            return None
        q_offset = int(q_offset)
    return q_offset + q_length - kv_offset


def options_of(
    module: torch.nn.Module,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Translate the options of an attention function of transformers to the op's.

    The arguments are those of `resformer_attention`. Raises ValueError for unsupported ones.
    """
    if dropout:
        raise ValueError(
            f"attn_implementation='{NAME}' has no dropout, got {dropout}: set "
            "config.attention_dropout to 0, or choose another implementation for training"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"attn_implementation='{NAME}' computes no attention weights: output_attentions "
            "needs attn_implementation='eager'"
        )
    for name in ("position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation='{NAME}' does not take {name}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    reach = -1 if sliding_window is None else sliding_window - 1
    return {
        "causal": causal,
        "window": (reach, 0 if causal else reach),
        "scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }


def resformer_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the arguments of transformers' attention functions.

    Calls `value_residual_attention`, or `attention_with_kvcache` for few queries outside training
    and compilation.

    Args:
        module: the calling attention module; its `is_causal` is the default.
        query: (B, Hq, Tq, D); read in place, like key and value.
        key: (B, Hkv, Tk, D), not repeated for grouped heads.
        value: (B, Hkv, Tk, Dv).
        attention_mask: as `resformer_mask` returns it, or additive, (B or 1, Hq or 1, Tq, Tk).
        kwargs: `scaling`, the factor of q.k; `sliding_window`, the number of keys that a query sees
            on either side, including its own; `softcap`; `s_aux`, sinks, (Hq,); `is_causal`;
            `dropout`, which must be 0; `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and
            `max_length_k` for packed sequences, with B = 1.

    Returns:
        (B, Tq, Hq, Dv), and None for the weights.
    """
    options = options_of(module, **kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if kwargs.get("cu_seq_lens_q") is not None:
        packed = value_residual_attention_varlen(
            q.squeeze(0),
            k.squeeze(0),
            v.squeeze(0),
            cu_seqlens_q=kwargs["cu_seq_lens_q"],
            cu_seqlens_k=kwargs["cu_seq_lens_k"],
            max_seqlen_q=kwargs["max_length_q"],
            max_seqlen_k=kwargs["max_length_k"],
            **options,
        )
        return packed.unsqueeze(0), None
    by_key = attention_mask is None or attention_mask.dim() == 2
    if by_key and attention_mask is not None:
        count = attention_mask.shape[-1]
        k, v = k[:, :count], v[:, :count]
    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    # A compiler treats that op as writing to its caches and might copy them.
    elsewhere = is_torchdynamo_compiling() or wants_gradient((q, k, v, options["sinks"]))
    if by_key and rows <= DECODE_ROWS and not elsewhere:
        decoded: Tensor = attention_with_kvcache(
            q, k, v, cache_seqlens=k.shape[1], key_mask=attention_mask, **options
        )
        return decoded, None
    if attention_mask is not None and by_key:
        options["attn_bias"] = attention_mask[:, None, None, :]
    elif attention_mask is not None:
        options.update(causal=False, window=(-1, -1))
        options["attn_bias"] = attention_mask[..., : k.shape[1]]
    return value_residual_attention(q, k, v, **options), None


def register() -> None:
    """Register `attn_implementation="resformer"` and its mask function."""
    AttentionInterface.register(NAME, resformer_attention)
    AttentionMaskInterface.register(NAME, resformer_mask)
