"""A small decoder with every value-residual variant: RoPE, RMSNorm, SwiGLU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resformer_kernels._core.checks import check_ids, integer
from resformer_kernels.kvcache.cache.cache import SharedValueCache
from resformer_kernels.kvcache.cache.layout import KVLayout
from resformer_kernels.models.config import LanguageModelConfig
from resformer_kernels.models.generation import Generation, generate
from resformer_kernels.nn import (
    DenseMix,
    EmbeddingMix,
    FirstValues,
    FixedMix,
    LearnedMix,
    OwnValues,
    RotaryEmbedding,
    ValueMix,
    ValueResidualAttention,
)
from resformer_kernels.nn.epilogue import Epilogue
from resformer_kernels.nn.local import local_parameter

CONSTANTS = {"identity": (0.5, 0.5), "constant": (1.0, 2.0), "sparse": (1.0, 5.0)}
"""lambda_v and lambda_first of the variants that do not learn them."""
LEARNED = {"learnable": (0.5, 0.5), "learnable-plus": (0.5, 0.5)}
"""Initial lambda_v and lambda_first of the variants that learn them."""


def mixing_layer(
    variant: str, layer: int, kv_heads: int, coefficients: tuple[float, float] | None
) -> ValueMix:
    """The mix of a layer that mixes values.

    Args:
        variant: one of `VARIANTS`, except "transformer" and "value-embedding".
        layer: the layer, counted from 0; not 0.
        kv_heads: number of KV heads.
        coefficients: lambda_v and lambda_first, initial where they are learned. None for "dense",
            "svformer" and "fused-kv-lite".
    """
    if variant == "dense":
        return DenseMix(layer + 1)
    if coefficients is None:
        return FirstValues()
    if variant in CONSTANTS:
        return FixedMix(*coefficients)
    heads = kv_heads if variant == "learnable-plus" else None
    return LearnedMix(heads, lambda_v=coefficients[0], lambda_first=coefficients[1])


def build_value_mix(config: LanguageModelConfig, layer: int) -> ValueMix:
    """The mix of layer `layer`, counted from 0."""
    if config.variant == "value-embedding":
        if layer % 2 != (config.num_layers - 1) % 2:
            return OwnValues()
        return EmbeddingMix(
            config.vocab_size,
            config.resolved_kv_heads,
            config.resolved_head_dim,
            gate_channels=min(config.gate_channels, config.dim),
            gate_range=config.gate_range,
        )
    first_mixing = {
        "transformer": config.num_layers,
        "sparse": config.num_layers - config.resolved_sparse_layers,
        "fused-kv-lite": config.resolved_middle_layer + 1,
    }
    if layer < first_mixing.get(config.variant, 1):
        return OwnValues()
    coefficients = (CONSTANTS | LEARNED).get(config.variant)
    return mixing_layer(config.variant, layer, config.resolved_kv_heads, coefficients)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202). x and the result: (..., dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SquaredReLU(nn.Module):
    """down(relu(up(x))²) (So et al., arXiv 2109.08668). x and the result: (..., dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP."""
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Block(nn.Module):
    """Attention and MLP, each after an RMSNorm and added to the residual stream."""

    def __init__(self, config: LanguageModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = ValueResidualAttention(
            config.dim,
            config.num_heads,
            config.num_kv_heads,
            head_dim=config.head_dim,
            v_mix=build_value_mix(config, layer),
            window=config.window(layer),
            qk_norm=config.qk_norm,
            scale=config.attention_scale,
            exclusive=config.exclusive,
            gate=config.gate,
            projects_keys=layer <= config.resolved_middle_layer,
            backend=config.backend,
        )
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        mlp = SwiGLU if config.mlp == "swiglu" else SquaredReLU
        self.mlp = mlp(config.dim, config.resolved_mlp_hidden)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        token_ids: Tensor,
        keys: Tensor | None,
        *earlier_values: Tensor,
        cache: SharedValueCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream after this block, (B, T, dim), and its values and rotated keys, each
        (B, T, Hkv, D). `keys` are those of the layer whose keys it attends over, if not its own."""
        attended, values, keys = self.attention(
            self.attention_norm(x),
            *earlier_values,
            keys=keys,
            return_keys=True,
            rotary=(cos, sin),
            token_ids=token_ids,
            cache=cache,
            layer=self.layer,
        )
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), values, keys


def run_block(
    config: LanguageModelConfig,
    layer: int,
    block: nn.Module,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    token_ids: Tensor,
    earlier: tuple[Tensor, ...],
    keys: Tensor | None,
    cache: SharedValueCache | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Run layer `layer`, counted from 0: the stream after it, and the values and keys that later
    layers read. x and what is returned are as in `Block`; `earlier` and `keys` are those before."""
    arguments = (x, *rotary, token_ids, keys, *earlier)
    if cache is not None:
        x, values, made = block(*arguments, cache=cache)
    elif config.checkpointing and torch.is_grad_enabled():
        x, values, made = checkpoint(block, *arguments, use_reentrant=False)
    else:
        x, values, made = block(*arguments)
    if layer == 0 or config.variant == "dense":
        earlier = (*earlier, values)
    return x, earlier, made if layer == config.resolved_middle_layer else keys


def capped(logits: Tensor, softcap: float) -> Tensor:
    """c tanh(logits / c); the logits where c is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class LanguageModel(nn.Module):
    """A decoder over `config.vocab_size` tokens."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.rotary = RotaryEmbedding(
            config.resolved_head_dim, config.max_seqlen, base=config.rope_base
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if config.stream_scales:
            self.stream_scale = nn.Parameter(torch.ones(config.num_layers))
            self.input_scale = nn.Parameter(torch.zeros(config.num_layers))
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every weight; projections into the residual stream are scaled down by depth."""
        nn.init.normal_(self.embedding.weight)
        depth_scale = (2 * self.config.num_layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ".v_mix." not in name:
                std = module.in_features**-0.5
                into_stream = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std * depth_scale if into_stream else std)
            elif isinstance(module, (nn.RMSNorm, LearnedMix, DenseMix, EmbeddingMix, Epilogue)):
                module.reset_parameters()
        if self.config.stream_scales:
            nn.init.ones_(self.stream_scale)
            nn.init.zeros_(self.input_scale)
        # Small logits: training starts from the uniform distribution.
        nn.init.normal_(self.head.weight, std=0.1 * self.config.dim**-0.5)

    def forward(self, token_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            token_ids: (B, T) integers below vocab_size, T at most max_seqlen.
            targets: (B, T) integers, the next token of each position; -100 is ignored.

        Returns:
            Logits (B, T, vocab_size); with targets the mean cross-entropy in nats, float32, ().

        Raises:
            ValueError: token_ids is not (B, T), or longer than max_seqlen.
        """
        logits = self.logits(self.hidden(token_ids))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab_size) from the result of `hidden`, (..., dim)."""
        return capped(self.head(hidden), self.config.logit_softcap)

    def hidden(self, token_ids: Tensor, cache: SharedValueCache | None = None) -> Tensor:
        """The head's input, (B, T, dim), for tokens (B, T).

        With a cache the tokens continue its sequences and are appended to it: all of them, or none
        where this raises. A cache needs torch.no_grad().

        Raises:
            ValueError: token_ids is not (B, T), or exceeds max_seqlen together with the cache.
            RuntimeError: the cache is full, or gradients are enabled with a cache.
        """
        check_ids(token_ids, "(B, T)")
        rotary = self.rotary.on(token_ids.device)
        if cache is None:
            return self._stream(token_ids, rotary(token_ids.shape[1]), None)
        before = cache.lengths
        try:
            return self._stream(token_ids, rotary.after(before, token_ids.shape[1]), cache)
        except BaseException:
            # The step is over once every slot is written, which may be before the last layer.
            cache.rollback()
            cache.crop(before)
            raise

    def _stream(
        self, token_ids: Tensor, rotary: tuple[Tensor, Tensor], cache: SharedValueCache | None
    ) -> Tensor:
        x = self.embedding(token_ids)
        if self.config.embedding_norm:
            x = F.rms_norm(x, (self.config.dim,))
        embedded = x
        earlier: tuple[Tensor, ...] = ()
        keys: Tensor | None = None
        if self.config.stream_scales:
            both = self.stream_scale, self.input_scale
            scales = [local_parameter(scale, x, whole=True) for scale in both]
        for layer, block in enumerate(self.blocks):
            if self.config.stream_scales:
                x = scales[0][layer] * x + scales[1][layer] * embedded
            x, earlier, keys = run_block(
                self.config, layer, block, x, rotary, token_ids, earlier, keys, cache
            )
        return self.norm(x)

    def new_cache(
        self, batch: int, max_seqlen: int | None = None, **options: Any
    ) -> SharedValueCache:
        """An empty cache for this model. It holds keys and V' of every layer; SVFormer's V once;
        FusedKV-Lite's keys and values up to the middle layer.

        Args:
            batch: number of sequences.
            max_seqlen: capacity of each, in tokens; None: the model's.
            options: arguments of `SharedValueCache`: `dtype` (default: the weights'), and
                `num_pages` and `page_size` for a paged cache.
        """
        config = self.config
        layouts = {
            "svformer": KVLayout.svformer(config.num_layers),
            "fused-kv-lite": KVLayout.fused_kv_lite(
                config.num_layers, config.resolved_middle_layer
            ),
        }
        defaults = {"dtype": self.embedding.weight.dtype, "device": self.embedding.weight.device}
        return SharedValueCache(
            layouts.get(config.variant, KVLayout.standard(config.num_layers)),
            batch=batch,
            max_seqlen=config.max_seqlen if max_seqlen is None else max_seqlen,
            num_kv_heads=self._own_heads()[1],
            head_dim=config.resolved_head_dim,
            **{**defaults, **options},
        )

    def _own_heads(self) -> tuple[int, int]:
        """Query and KV heads of this rank: all, unless a tensor-parallel plan has dealt them
        out."""
        first = self.blocks[0]
        assert isinstance(first, Block)
        return first.attention.num_heads, first.attention.num_kv_heads

    def generate(self, token_ids: Tensor, max_new_tokens: int, **options: Any) -> Generation:
        """Continue each row of token_ids; see `models.generation.generate` for the arguments.

        Where tensor parallelism has dealt out the heads all ranks call this together, with the same
        arguments. ValueError if they would draw tokens without a seed, each its own.
        """
        split = self._own_heads()[0] != self.config.num_heads
        if split and options.get("temperature", 0.0) and options.get("seed") is None:
            raise ValueError(
                "seed must be an int, so that all ranks of a tensor-parallel model draw the same "
                "tokens, got None"
            )
        return generate(self, token_ids, max_new_tokens, **options)


def parameter_count(config: LanguageModelConfig) -> int:
    """Number of trainable parameters of the model, without allocating any."""
    with torch.device("meta"):
        model = LanguageModel(config)
    return sum(parameter.numel() for parameter in model.parameters())


def with_parameter_budget(config: LanguageModelConfig, parameters: int) -> LanguageModelConfig:
    """The config with `mlp_hidden` set so that the model's size is as close to `parameters` as it
    gets: variants can then be compared at equal size.

    The projections that SVFormer and FusedKV-Lite lack make the MLP wider; a value embedding's
    table makes it narrower. The size is exact to within half of 3 · dim · num_layers (relu2: 2).

    Raises:
        ValueError: even mlp_hidden = 1 exceeds the budget.
    """
    parameters = integer("parameters", parameters, 1)
    slope = (3 if config.mlp == "swiglu" else 2) * config.dim * config.num_layers
    fixed = parameter_count(replace(config, mlp_hidden=1)) - slope
    hidden = round((parameters - fixed) / slope)
    if hidden < 1:
        raise ValueError(
            f"parameters must be at least {fixed + slope} for this config, got {parameters}"
        )
    return replace(config, mlp_hidden=hidden)
