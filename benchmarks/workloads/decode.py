"""Decoding as a thing to time: one token through the layers of a model, each with its cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workloads.common import FLASH_ATTN, Makers, cuda_only, require_kernel
from resformer_kernels.bench.timing import OURS, Call, Unavailable
from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.testing.inputs import dtype_name

GQA = "SDPA enable_gqa"
FOLDED = "SDPA, group as length"
OWN_VALUES = "ours, V a layer"

_MOST_BYTES_FOR_GQA = 2**29
"""Torch copies half-precision caches for every query head, at about 0.5 GB/s."""


@dataclass(frozen=True)
class DecodeBenchmark:
    """Attention of one new token a sequence in every layer, over full caches (B, T, Hkv, D).

    The layers' caches together are larger than the processor's, as a model's are, so that each is
    read from memory. The peers are torch's two ways to decode a query group: `enable_gqa`, and the
    group folded into the axis of queries. With `shared` every layer reads one V (SVFormer), and
    the peer is this package's own attention over a V a layer.
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

    @property
    def name(self) -> str:
        """Shape, layers and dtype."""
        shape = f"B{self.batch} Hq{self.heads} Hkv{self.kv_heads} T{self.length} D{self.head_dim}"
        kind = "one V" if self.shared else "V a layer"
        return f"decode {shape}, {self.layers} layers, {kind}, {dtype_name(self.dtype)}"

    @property
    def bytes(self) -> int:
        """K of every layer, and V of every layer or once."""
        rows = self.batch * self.length * self.kv_heads * self.head_dim * self.dtype.itemsize
        return rows * (self.layers + (1 if self.shared else self.layers))

    def makers(self) -> Makers:
        """Ours and the peers, all over the same caches, which the first of them allocates; ours is
        `Unavailable` on a GPU where no kernel serves it."""
        q = torch.randn(self.batch, 1, self.heads, self.head_dim, device=self.device).to(self.dtype)
        lengths = torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)
        grouped = self.heads != self.kv_heads
        folded = q.view(self.batch, self.kv_heads, -1, self.head_dim)
        caches = functools.cache(self._caches)

        def attend(k: Tensor, v: Tensor) -> object:
            return attention_with_kvcache(q, k, v, cache_seqlens=lengths)

        def ours(*, shared: bool) -> Call:
            keys, values = caches()
            if self.device != "cpu":
                arguments, options = (q, keys[0], values[0]), {"cache_seqlens": lengths}
                require_kernel(attention_with_kvcache, arguments, options)
            return _through(attend, keys, [values[0]] * self.layers if shared else values)

        def enable_gqa(k: Tensor, v: Tensor) -> object:
            q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q_, k_, v_, enable_gqa=grouped)

        def gqa() -> Call:
            if grouped and self.dtype.itemsize < 4 and self.bytes > _MOST_BYTES_FOR_GQA:
                raise Unavailable("takes seconds a call at this size")
            return _through(enable_gqa, *caches())

        def fold(k: Tensor, v: Tensor) -> object:
            return F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2))

        if self.shared:
            return {OURS: lambda: ours(shared=True), OWN_VALUES: lambda: ours(shared=False)}
        makers: Makers = {OURS: lambda: ours(shared=False), GQA: gqa}
        if grouped:
            # Without groups it is the same call as the other.
            makers[FOLDED] = lambda: _through(fold, *caches())
        return {**makers, FLASH_ATTN: functools.partial(cuda_only, "flash_attn")}

    def _caches(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer."""
        shape = (self.batch, self.length, self.kv_heads, self.head_dim)
        first = torch.empty(shape, dtype=self.dtype, device=self.device).normal_()
        # Drawing gigabytes of normal numbers would take longer than the measurement.
        others = [first.clone() for _ in range(2 * self.layers - 1)]
        return [first, *others[: self.layers - 1]], others[self.layers - 1 :]


def _through(attend: Callable[[Tensor, Tensor], object], k: list[Tensor], v: list[Tensor]) -> Call:
    @torch.no_grad()
    def step() -> None:
        for keys, values in zip(k, v, strict=True):
            attend(keys, values)

    return step
