"""Decoding as a thing to time: one token through the layers of a model, each with its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.testing.timing import OURS
from resformer_kernels.testing.workloads import Call, require_kernel

GQA = "SDPA enable_gqa"
FOLDED = "SDPA, group as length"
OWN_VALUES = "ours, V a layer"


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
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"B{self.batch} Hq{self.heads} Hkv{self.kv_heads} T{self.length} D{self.head_dim}"
        kind = "one V" if self.shared else "V a layer"
        return f"decode {shape}, {self.layers} layers, {kind}, {dtype}"

    @property
    def bytes(self) -> int:
        """K of every layer, and V of every layer or once."""
        rows = self.batch * self.length * self.kv_heads * self.head_dim * self.dtype.itemsize
        return rows * (self.layers + (1 if self.shared else self.layers))

    def contestants(self) -> dict[str, Call]:
        """Ours and the peers, all over the same caches."""
        return {name: make() for name, make in self.makers().items()}

    def makers(self) -> dict[str, Callable[[], Call]]:
        """What makes each contestant; ours is `Unavailable` where no kernel serves it."""
        shape = (self.batch, 1, self.heads, self.head_dim)
        q = torch.randn(shape, device=self.device).to(self.dtype)
        keys = [self._cache() for _ in range(self.layers)]
        values = [self._cache() for _ in range(self.layers)]
        lengths = torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)

        def attend(k: Tensor, v: Tensor) -> object:
            return attention_with_kvcache(q, k, v, cache_seqlens=lengths)

        def ours(v: list[Tensor]) -> Call:
            if self.device != "cpu":
                require_kernel(attention_with_kvcache, q, keys[0], v[0], cache_seqlens=lengths)
            return _through(attend, keys, v)

        grouped = self.heads != self.kv_heads
        folded = q.view(self.batch, self.kv_heads, -1, self.head_dim)

        def enable_gqa(k: Tensor, v: Tensor) -> object:
            q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q_, k_, v_, enable_gqa=grouped)

        def fold(k: Tensor, v: Tensor) -> object:
            return F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2))

        if self.shared:
            one = [values[0]] * self.layers
            return {OURS: partial(ours, one), OWN_VALUES: partial(ours, values)}
        return {
            OURS: partial(ours, values),
            GQA: partial(_through, enable_gqa, keys, values),
            FOLDED: partial(_through, fold, keys, values),
        }

    def _cache(self) -> Tensor:
        shape = (self.batch, self.length, self.kv_heads, self.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_()


def _through(attend: Callable[[Tensor, Tensor], object], k: list[Tensor], v: list[Tensor]) -> Call:
    def step() -> None:
        with torch.no_grad():
            for keys, values in zip(k, v, strict=True):
                attend(keys, values)

    return step
