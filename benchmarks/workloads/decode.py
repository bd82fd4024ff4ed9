"""Decoding as a thing to time: one token through the layers of a model, each with its cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workloads.common import FLASH_ATTN, Makers, cuda_only, require_kernel
from resformer_kernels.bench.timing import OURS, Call, Unavailable
from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.testing.inputs import dtype_name

GQA = "SDPA enable_gqa"
FOLDED = "SDPA, group as length"
TIME_FIRST = " (B,T,H,D)"
"""Added to a peer's name where it reads caches in our layout, not in its own."""
OWN_VALUES = "ours, V a layer"

Caches = Callable[[], tuple[list[Tensor], list[Tensor]]]
"""Keys and values of every layer."""
Layout = Callable[[list[Tensor]], list[Tensor]]

_MOST_BYTES_FOR_GQA = 2**29
"""On a CPU torch copies half-precision caches for every query head, at about 0.5 GB/s."""


@dataclass(frozen=True)
class DecodeBenchmark:
    """Attention of one new token a sequence in every layer, over full caches.

    The layers' caches together are larger than the processor's, as a model's are, so that each is
    read from memory. The peers are torch's two ways to decode a query group: `enable_gqa`, and the
    group folded into the axis of queries; each over contiguous caches (B, Hkv, T, D), as a
    `StaticCache` of transformers has them, and over ours, (B, T, Hkv, D). With `shared` every layer
    reads one V (SVFormer), and the peer is this package's own attention over a V a layer. With
    `heads_first` ours reads the caches of a `StaticCache` in place.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: torch.dtype
    shared: bool = False
    layers: int = 12
    flops: int = 0
    group: str = "decode"
    device: str = "cpu"
    heads_first: bool = False

    @property
    def name(self) -> str:
        """Shape, layers and dtype."""
        shape = f"B{self.batch} Hq{self.heads} Hkv{self.kv_heads} T{self.length} D{self.head_dim}"
        kind = "one V" if self.shared else "V a layer"
        kind += ", caches (B,H,T,D)" if self.heads_first else ""
        return f"decode {shape}, {self.layers} layers, {kind}, {dtype_name(self.dtype)}"

    @property
    def bytes(self) -> int:
        """K of every layer, and V of every layer or once."""
        rows = self.batch * self.length * self.kv_heads * self.head_dim * self.dtype.itemsize
        return rows * (self.layers + (1 if self.shared else self.layers))

    def makers(self) -> Makers:
        """Ours and the peers, over the same numbers, which the first of them draws; ours is
        `Unavailable` on a GPU where no kernel serves it."""
        q, caches = self.query(), functools.cache(self.caches)

        if self.shared:
            return {
                OURS: lambda: self._ours(q, *caches(), shared=True),
                OWN_VALUES: lambda: self._ours(q, *caches(), shared=False),
            }
        makers: Makers = {OURS: lambda: self._ours(q, *caches(), shared=False)}
        peers = {GQA: self._gqa, FOLDED: self._folded}
        if self.heads == self.kv_heads:
            # Without groups it is the same call as the other.
            del peers[FOLDED]
        for name, peer in peers.items():
            makers[name] = partial(peer, q, caches, _contiguous)
            makers[name + TIME_FIRST] = partial(peer, q, caches, _viewed)
        return {**makers, FLASH_ATTN: partial(cuda_only, "flash_attn")}

    def _ours(self, q: Tensor, k: list[Tensor], v: list[Tensor], *, shared: bool) -> Call:
        lengths = torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)
        if self.heads_first:
            k, v = ([x.transpose(1, 2) for x in _contiguous(caches)] for caches in (k, v))

        def attend(k: Tensor, v: Tensor) -> object:
            return attention_with_kvcache(q, k, v, cache_seqlens=lengths)

        if self.device != "cpu":
            require_kernel(attention_with_kvcache, (q, k[0], v[0]), {"cache_seqlens": lengths})
        return _through(attend, k, [v[0]] * self.layers if shared else v)

    def _gqa(self, q: Tensor, caches: Caches, layout: Layout) -> Call:
        grouped = self.heads != self.kv_heads
        copied = self.device == "cpu" and grouped and self.dtype.itemsize < 4
        if copied and self.bytes > _MOST_BYTES_FOR_GQA:
            raise Unavailable("takes seconds a call at this size")
        attend = partial(F.scaled_dot_product_attention, q.transpose(1, 2), enable_gqa=grouped)
        return _through(attend, *map(layout, caches()))

    def _folded(self, q: Tensor, caches: Caches, layout: Layout) -> Call:
        folded = q.view(self.batch, self.kv_heads, -1, self.head_dim)
        return _through(partial(F.scaled_dot_product_attention, folded), *map(layout, caches()))

    def query(self) -> Tensor:
        """A new token a sequence, (B, 1, Hq, D)."""
        q = torch.randn(self.batch, 1, self.heads, self.head_dim, device=self.device)
        return q.to(self.dtype)

    def caches(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer, (B, T, Hkv, D)."""
        shape = (self.batch, self.length, self.kv_heads, self.head_dim)
        first = torch.empty(shape, dtype=self.dtype, device=self.device).normal_()
        # Drawing gigabytes of normal numbers would take longer than the measurement.
        others = [first.clone() for _ in range(2 * self.layers - 1)]
        return [first, *others[: self.layers - 1]], others[self.layers - 1 :]


def _viewed(caches: list[Tensor]) -> list[Tensor]:
    return [cache.transpose(1, 2) for cache in caches]


def _contiguous(caches: list[Tensor]) -> list[Tensor]:
    return [cache.transpose(1, 2).contiguous() for cache in caches]


def _through(attend: Callable[[Tensor, Tensor], object], k: list[Tensor], v: list[Tensor]) -> Call:
    @torch.no_grad()
    def step() -> None:
        for keys, values in zip(k, v, strict=True):
            attend(keys, values)

    return step
