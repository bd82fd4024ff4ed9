"""A cache as lists of tensors in Python, and a cache that is driven beside it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resformer_kernels import KVLayout, SharedValueCache, value_residual_attention

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 12
CAPACITY, PAGE = 24, 4

LAYOUTS = {
    "standard": KVLayout.standard(3),
    "svformer": KVLayout.svformer(3),
    "cla": KVLayout.cla(4, 2),
    "shared": KVLayout.cla(4, 2, share_values=True),
    "svformer_cla": KVLayout.svformer_cla(4, 2),
    "fused_kv_lite": KVLayout.fused_kv_lite(4, 1),
    "free": KVLayout((1, 0, 1), (0, 1, 1)),
}


def new_cache(
    layout: KVLayout,
    paged: bool,
    *,
    batch: int = 2,
    rows: int | None = None,
    pages: int = 40,
    dtype: torch.dtype = torch.float32,
) -> SharedValueCache:
    """A small cache with `batch` empty sequences; a contiguous one may have more `rows`."""
    sizes: dict[str, Any] = {"num_kv_heads": KV_HEADS, "head_dim": DIM}
    sizes |= {"value_head_dim": VALUE_DIM, "dtype": dtype, "max_seqlen": CAPACITY}
    if paged:
        return SharedValueCache(layout, num_pages=pages, page_size=PAGE, batch=batch, **sizes)
    cache = SharedValueCache(layout, batch=rows or batch, **sizes)
    cache.free(cache.sequences[batch:])
    return cache


def contents(cache: SharedValueCache) -> list[Tensor]:
    """Copies of every tensor of the cache."""
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return [x.clone() for x in tensors if x is not None]


@dataclass
class Driver:
    """A cache, and for each of its sequences the keys and values of every layer."""

    cache: SharedValueCache
    seed: int = 0
    held: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.admit(self.cache.sequences)

    @property
    def layers(self) -> int:
        return self.cache.layout.num_layers

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def admit(self, names: tuple[int, ...]) -> None:
        for name in names:
            empty = (torch.zeros(0, KV_HEADS, DIM), torch.zeros(0, KV_HEADS, VALUE_DIM))
            self.held[name] = [empty] * self.layers

    def tokens(
        self, batch: int, count: int, dtype: torch.dtype = torch.float32
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """New keys and values of each layer; None where another layer writes them."""
        layout = self.cache.layout
        found = []
        for layer in range(self.layers):
            k = v = None
            if layout.writes_keys(layer):
                k = self.draw(batch, count, KV_HEADS, DIM).to(dtype)
            if layout.writes_values(layer):
                v = self.draw(batch, count, KV_HEADS, VALUE_DIM).to(dtype)
            found.append((k, v))
        return found

    def compare(self, layer: int, q: Tensor, out: Tensor, names: tuple[int, ...]) -> None:
        """Hold a layer's output against causal attention over what each sequence has."""
        for row, name in enumerate(names):
            keys, values = self.held[name][layer]
            expected = value_residual_attention(
                q[row : row + 1], keys[None], values[None], causal=True, backend="reference"
            )
            torch.testing.assert_close(out[row : row + 1], expected)

    def step(
        self, count: int, names: tuple[int, ...] | None = None, *, append: bool = False
    ) -> None:
        """Append `count` tokens everywhere, and hold each layer's output against the model's."""
        chosen = self.cache.sequences if names is None else names
        new = self.tokens(len(chosen), count)
        layout = self.cache.layout
        for layer, (k, v) in enumerate(new):
            # Layers may come in any order as long as a slot's writer is first.
            q = self.draw(len(chosen), count, HEADS, DIM)
            if append and (k is not None or v is not None):
                self.cache.append(layer, k, v, sequences=names)
                out = self.cache.attend(layer, q, sequences=names)
            else:
                out = self.cache.attend(layer, q, k, v, sequences=names)
            k_new = new[layout.key_slots.index(layout.key_slots[layer])][0]
            v_new = new[layout.value_slots.index(layout.value_slots[layer])][1]
            assert k_new is not None
            assert v_new is not None
            for row, name in enumerate(chosen):
                keys, values = self.held[name][layer]
                keys, values = torch.cat([keys, k_new[row]]), torch.cat([values, v_new[row]])
                self.held[name] = [*self.held[name]]
                self.held[name][layer] = (keys, values)
            self.compare(layer, q, out, chosen)

    def check(self) -> None:
        """Read everything back, without a step."""
        cache = self.cache
        assert set(cache.sequences) == set(self.held)
        assert cache.lengths == tuple(len(self.held[name][0][0]) for name in cache.sequences)
        for layer in range(self.layers):
            q = self.draw(len(cache.sequences), 1, HEADS, DIM)
            self.compare(layer, q, cache.attend(layer, q), cache.sequences)

    def act(self, luck: random.Random) -> None:
        """Make one random change that the cache has room for."""
        cache, names = self.cache, self.cache.sequences
        action = luck.choice(("step", "step", "some", "crop", "reorder", "fork", "free", "add"))
        if action in ("step", "some") and names and max(cache.lengths) <= CAPACITY - 5:
            some = luck.sample(names, luck.randint(1, len(names)))
            self.step(luck.randint(1, 5), tuple(some) if action == "some" else None)
        elif action == "crop" and names:
            kept = [luck.randint(0, length) for length in cache.lengths]
            cache.crop(kept)
            for name, length in zip(names, kept, strict=True):
                self.held[name] = [(k[:length], v[:length]) for k, v in self.held[name]]
        elif action == "reorder" and names:
            picks = [luck.randrange(len(names)) for _ in names]
            before = [self.held[names[pick]] for pick in picks]
            self.held = dict(zip(cache.reorder(picks), before, strict=True))
        elif action == "fork" and 0 < len(names) < 4:
            name = luck.choice(names)
            self.held[cache.fork(name)] = self.held[name]
        elif action == "free" and len(names) > 1:
            name = luck.choice(names)
            cache.free(name)
            del self.held[name]
        elif action == "add" and len(names) < 4:
            self.admit(cache.add())
