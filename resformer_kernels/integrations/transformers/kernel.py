"""`attn_implementation="resformer"`: the attention kernel for any model of transformers.

The function is the kernel alone: values arrive mixed. It comes with its mask function, without
which transformers would pass no mask and padding would be ignored. The two agree on three forms
of a mask:

    None        the causal order and the window of the module are all there is to mask
    (B, n)      True where a key may be seen; beside it order and window as above. n below the
                keys' count: the keys after n are empty room of a static cache
    (B or 1, 1, Tq, Tk)   everything, order and window included: what a custom mask needs

Order and window are those of the module, as with FlashAttention: `is_causal`, `sliding_window`.
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
"""Queries times query heads of a KV head, up to which reading the keys once is all there is to do:
there `attention_with_kvcache` is two to five times as fast on a CPU, and beyond it slower."""


def _parts(function: Any) -> tuple[Any, ...]:
    """The code objects a mask function is composed of: what it does, whatever the numbers."""
    cells = function.__closure__ or ()
    inner = [cell.cell_contents for cell in cells]
    flat = [x for item in inner for x in (item if isinstance(item, tuple) else (item,))]
    return (function.__code__, *(_parts(x) for x in flat if hasattr(x, "__code__")))


_WINDOWED = tuple(
    _parts(function(1))
    for function in (
        sliding_window_causal_mask_function,
        sliding_window_bidirectional_mask_function,
    )
)


def _says_what_the_module_says(function: Any) -> bool:
    """Whether a mask function stands for `is_causal` and `sliding_window` and nothing more."""
    if function is causal_mask_function or function is bidirectional_mask_function:
        return True
    # A compiler cannot look into closures: there a window's mask is made in full.
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
    """The mask of a forward pass, in the smallest form that says it.

    Args are those that transformers gives every mask function: queries stand at q_offset and
    after, keys at kv_offset and after, attention_mask is bool, (B, all tokens so far). Where
    neither skip is allowed the mask is made in full.
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
    """How many keys there are, the new ones included; None where it cannot be read."""
    if isinstance(q_offset, Tensor):
        # A static cache counts on its device. One read for all layers pays before a long prompt;
        # for single tokens transformers allows no skip, and this is not reached.
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
    """The kernel's options that stand for those of an attention function of transformers.

    Args are those of `resformer_attention`. ValueError for what the kernel has not.
    """
    if dropout:
        raise ValueError(
            f"attn_implementation='{NAME}' has no dropout, got {dropout}: set "
            "config.attention_dropout to 0, or choose another implementation for training"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"attn_implementation='{NAME}' never holds attention weights: output_attentions "
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

    `value_residual_attention`; for few queries, where nothing is trained or compiled,
    `attention_with_kvcache`.

    Args:
        module: the calling attention module, asked for `is_causal` where that is not given.
        query: (B, Hq, Tq, D); read in place, like the others.
        key: (B, Hkv, Tk, D), not repeated for grouped heads.
        value: (B, Hkv, Tk, Dv).
        attention_mask: as `resformer_mask` makes it, or additive, (B or 1, Hq or 1, Tq, Tk).
        kwargs: `scaling`, the factor of q.k; `sliding_window`, the keys that a query sees, its own
            included, on either side; `softcap`; `s_aux`, sinks, (Hq,); `is_causal`; `dropout`,
            which must be 0; `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`,
            which pack sequences, B = 1.

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
    # To a compiler that op writes to its caches, and theirs might be copied for it.
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
    """Make `attn_implementation="resformer"` known, with its mask function."""
    AttentionInterface.register(NAME, resformer_attention)
    AttentionMaskInterface.register(NAME, resformer_mask)
