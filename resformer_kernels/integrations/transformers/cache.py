"""transformers' cache interface over `SharedValueCache`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from resformer_kernels._core.checks import integer
from resformer_kernels.integrations.transformers.config import SVFORMER
from resformer_kernels.kvcache.cache.cache import SharedValueCache
from resformer_kernels.kvcache.cache.layout import KVLayout

_KINDS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
"""Layer types that cache keys and values; the masks of windows and chunks are the model's."""


def _decoder(config: Any) -> Any:
    """The config of the layers that cache. ValueError unless each of them caches keys and values of
    every token, and nothing else."""
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"config must be a config of transformers, got {type(config).__name__}")
    decoder: Any = config.get_text_config(decoder=True)
    kinds = getattr(decoder, "layer_types", None) or getattr(decoder, "layers_block_type", None)
    others = sorted(set(kinds or ()) - _KINDS)
    crossed = ("is_encoder_decoder", "add_cross_attention", "cross_attention_layers")
    modes = getattr(decoder, "kv_sharing_modes", None) or ()
    if getattr(decoder, "num_hidden_layers", None) is None:
        found = "no num_hidden_layers: pass the config of the part that generates"
    elif others:
        found = f"layers of other types: {', '.join(others)}"
    elif any(getattr(part, name, None) for part in (config, decoder) for name in crossed):
        found = "layers of cross-attention, which cache an encoder's keys and values"
    elif "reuse" in modes or getattr(decoder, "num_kv_shared_layers", None):
        found = "layers that reuse the keys and values of others"
    else:
        return decoder
    raise ValueError(
        "ResFormerCache is for models whose every layer caches keys and values of every token, but "
        f"config, a {type(config).__name__}, has {found}. For others there are transformers' caches"
    )


class _Layer(CacheLayerMixin):
    """One layer of a `ResFormerCache`, to which it forwards every call."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: ResFormerCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.cache.make(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        return self.cache.append(self.index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return self.cache.max_seqlen


class ResFormerCache(Cache):
    """A cache that stores an SVFormer's values once, for `generate(past_key_values=...)`.

    The tensors are those of a `SharedValueCache`, allocated at the first use, when batch, heads and
    dtype are known. With `attn_implementation="resformer"` a converted model attends in place with
    `attention_with_kvcache`; any other attention function gets the keys and values, as views unless
    the batch was reordered or they are quantised. Full and sliding layers can be mixed: every layer
    stores all tokens. Beams, cropping and paging work.

    Copies (`copy`, `pickle`) are independent. After `reset` another batch, dtype or device may
    follow. To be used without gradients, under `torch.no_grad()`; a cache made in inference mode
    may be used outside of it.

    Args:
        config: the model's config, that of a multimodal model too. A stock model or a ResFormer
            gets a standard cache.
        max_seqlen: maximum tokens of a sequence, including the prompt.
        dtype: storage dtype; None: the model's. torch.int8 stores codes and a float32 scale per
            token and head.
        page_size: tokens per page; None: a contiguous cache. Beams with a common prefix share its
            pages.
        num_pages: pages for all sequences; None: enough for max_seqlen tokens in each.

    Raises:
        TypeError, ValueError: config is not of a model whose every layer caches keys and values of
            every token, as layers of linear attention, of cross-attention, and layers that reuse
            others' do not; or a size is not an int of 1 or more (num_pages: 0).
        ValueError, RuntimeError: as `SharedValueCache`, at the first use; RuntimeError when full.
    """

    def __init__(
        self,
        config: Any,
        max_seqlen: int,
        *,
        dtype: torch.dtype | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> None:
        if page_size is None and num_pages is not None:
            raise ValueError(f"num_pages needs a page_size, got num_pages={num_pages}")
        self.max_seqlen, self.dtype = integer("max_seqlen", max_seqlen, 1), dtype
        self.page_size = None if page_size is None else integer("page_size", page_size, 1)
        self.num_pages = None if num_pages is None else integer("num_pages", num_pages, 0)
        decoder = _decoder(config)
        count = decoder.num_hidden_layers
        shared: list[int] = []
        if getattr(decoder, "value_residual", None) == SVFORMER:
            shared = decoder.value_residual_layers
        own = [layer for layer in range(count) if layer not in shared]
        slots = (0 if layer in shared else own.index(layer) for layer in range(count))
        self.layout = KVLayout(tuple(range(count)), tuple(slots))
        self.store: SharedValueCache | None = None
        self._blank = True
        super().__init__(layers=[_Layer(self, layer) for layer in range(count)])

    def __copy__(self) -> ResFormerCache:
        # Two caches over one store would each take for free what the other has written to.
        return copy.deepcopy(self)

    def make(self, k: Tensor, v: Tensor) -> SharedValueCache:
        """The store for keys and values like these, (B, Hkv, T, D): allocated at the first call,
        and again where it does not fit those that come first after `reset`."""
        blank, self._blank = self._blank, False
        dtype = k.dtype if self.dtype is None else self.dtype
        if self.store is not None:
            held = (len(self.store.sequences), self.store.num_kv_heads, self.store.keys.shape[-1])
            new = (k.shape[0], k.shape[1], k.shape[-1])
            fits = held == new and self.store.device == k.device
            if fits and (not blank or self.store.dtype == dtype):
                return self.store
            if not blank:
                raise ValueError(
                    f"keys must be (B, Hkv, T, D) = ({held[0]}, {held[1]}, T, {held[2]}) on "
                    f"{self.store.device}, as all in this cache, which holds {self.length} tokens "
                    f"of each of {held[0]} sequences; got {tuple(k.shape)} on {k.device}. After "
                    "reset() it takes another batch"
                )
            self.store = None  # Frees its memory before more is allocated.
        batch = k.shape[0]
        sizes: dict[str, Any] = {"batch": batch, "max_seqlen": self.max_seqlen}
        if self.page_size is not None:
            full = batch * -(-self.max_seqlen // self.page_size)
            sizes["num_pages"] = full if self.num_pages is None else self.num_pages
            sizes["page_size"] = self.page_size
        self.store = SharedValueCache(
            self.layout,
            **sizes,
            num_kv_heads=k.shape[1],
            head_dim=k.shape[-1],
            value_head_dim=v.shape[-1],
            dtype=dtype,
            device=k.device,
        )
        for layer in self.layers:
            layer.is_initialized = True
        return self.store

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, T, D) to a layer; return its keys and values of all tokens so far.

        With v of width zero nothing is appended to the values, and those returned are shared.
        """
        store = self.make(k, v)
        own = v.transpose(1, 2) if v.shape[-1] else None
        store.append(layer, k.transpose(1, 2), own)
        keys, values = (x.to(k.dtype).transpose(1, 2) for x in store.read(layer))
        return keys, values

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, **options: Any
    ) -> Tensor:
        """Append as `append` does, and attend in place.

        Args:
            layer: counted from 0.
            q: (B, Hq, Tq, D).
            k: (B, Hkv, Tq, D).
            v: (B, Hkv, Tq, D), or of width zero.
            padding: (B, T) bool, True where a key may be attended to, or None.
            options: arguments of `attention_with_kvcache`.

        Returns:
            (B, Tq, Hq, D).
        """
        store = self.make(k, v)
        own = v.transpose(1, 2) if v.shape[-1] else None
        out: Tensor = store.attend(
            layer, q.transpose(1, 2), k.transpose(1, 2), own, key_mask=padding, **options
        )
        return out

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return self.store.lengths[0] if self.store is not None and self.store.sequences else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values and scales; 0 before the first use."""
        return 0 if self.store is None else self.store.nbytes

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before the first use."""
        return -1 if self.store is None else len(self.store.sequences)

    def reset(self) -> None:
        """Remove every token, and roll back a step that an error interrupted.

        The next keys may have another batch size, dtype or device; then the store is made anew.
        """
        self._blank = True
        if self.store is not None:
            self.store.rollback()
            self.store.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the count is negative or 0, as in every cache of transformers."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                "tokens_to_remove must be negative or 0, the count to remove, got "
                f"{tokens_to_remove}"
            )
        if self.store is not None and tokens_to_remove:
            self.store.crop(max(0, self.length + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch by the sequences at these indices, for beam search."""
        self._pick(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence. RuntimeError without pages: a contiguous store has no free rows."""
        self._pick([place for place in range(max(0, self.batch_size)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at these indices, or where a bool mask is True."""
        places = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._pick(places.tolist())

    def _pick(self, places: list[int]) -> None:
        if self.store is not None:
            self.store.reorder(places)
