"""A whole model of transformers as a thing to time: one more token, its cache full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads.common import Makers, require_package
from benchmarks.workloads.decode import OWN_VALUES
from resformer_kernels.bench.timing import OURS, Call
from resformer_kernels.testing.inputs import dtype_name

MODELS = "decode in transformers"
STATIC, DYNAMIC = "sdpa, StaticCache", "sdpa, DynamicCache"

_SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


@dataclass(frozen=True)
class ModelBenchmark:
    """One token a sequence through a Llama of Hugging Face transformers: `model(ids,
    past_key_values=cache)`. Its weights, keys and values are random, the same for all contestants.

    Ours is `attn_implementation="resformer"` over a `ResFormerCache`; the peers are transformers'
    sdpa over its own caches. With `shared` the model is an SVFormer, whose values are cached once,
    and our own stock Llama is a peer too. All are `Unavailable` without transformers.
    """

    batch: int
    length: int
    dtype: torch.dtype
    shared: bool = False
    layers: int = 12
    flops: int = 0
    group: str = MODELS

    @property
    def name(self) -> str:
        """Shape, layers and dtype."""
        kind = "SVFormer" if self.shared else "Llama"
        shape = f"B{self.batch} T{self.length}"
        return f"{self.group} {kind} {shape}, {self.layers} layers, {dtype_name(self.dtype)}"

    @property
    def bytes(self) -> int:
        """Every weight of the stock model but the embedding, and the cache's keys and values."""
        hidden, heads = _SIZES["hidden_size"], _SIZES["num_attention_heads"]
        own, dim = _SIZES["num_key_value_heads"], _SIZES["head_dim"]
        weights = self.layers * hidden * (2 * (heads + own) * dim + 3 * _SIZES["intermediate_size"])
        weights += hidden * _SIZES["vocab_size"]
        rows = self.layers + (1 if self.shared else self.layers)
        return self.dtype.itemsize * (weights + rows * self.batch * self.length * own * dim)

    def makers(self) -> Makers:
        """Ours and the peers, each with a model and a cache of its own."""
        stock: Makers = {
            OURS: lambda: self._step("resformer", "ours", shared=self.shared),
            DYNAMIC: lambda: self._step("sdpa", "dynamic", shared=self.shared),
        }
        if self.shared:
            return stock | {OWN_VALUES: lambda: self._step("resformer", "ours", shared=False)}
        return stock | {STATIC: lambda: self._step("sdpa", "static", shared=False)}

    def _step(self, attention: str, kind: str, *, shared: bool) -> Call:
        require_package("transformers")
        model = self._model(attention, shared=shared)
        cache = self._cache(model.config, kind, shared=shared)
        token = torch.zeros(self.batch, 1, dtype=torch.long)

        @torch.no_grad()
        def step() -> Tensor:
            logits: Tensor = model(token, past_key_values=cache).logits
            # Every call appends at the same place.
            if kind == "static":
                for layer in cache.layers:
                    layer.cumulative_length.fill_(self.length)
            else:
                cache.crop(-1)
            return logits

        return step

    def _model(self, attention: str, *, shared: bool) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        from resformer_kernels.integrations.transformers import convert_to_resformer

        sizes: dict[str, Any] = {**_SIZES, "num_hidden_layers": self.layers}
        config = LlamaConfig(**sizes, max_position_embeddings=2 * self.length)
        config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(config).to(self.dtype).eval()
        if shared:
            convert_to_resformer(model, "svformer")
        return model

    def _cache(self, config: Any, kind: str, *, shared: bool) -> Any:
        """A cache that holds `length` tokens and has room for one more."""
        from transformers import DynamicCache, StaticCache

        from resformer_kernels.integrations.transformers import ResFormerCache

        most = self.length + 1
        if kind == "ours":
            cache: Any = ResFormerCache(config, most)
        elif kind == "static":
            cache = StaticCache(config, max_cache_len=most)
        else:
            cache = DynamicCache(config=config)
        shape = (self.batch, _SIZES["num_key_value_heads"], self.length, _SIZES["head_dim"])
        keys = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        for layer in range(self.layers):
            # An SVFormer's later layers have no values of their own.
            values = keys[..., :0] if shared and layer else keys
            cache.update(keys, values, layer)
        return cache
