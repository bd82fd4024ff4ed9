"""The configuration of the language model: sizes, windows and the value-residual variant."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from resformer_kernels._core.checks import integer, real
from resformer_kernels.nn.epilogue import checked_exclusive, checked_gate

VARIANTS = (
    "transformer",
    "identity",
    "constant",
    "learnable",
    "learnable-plus",
    "sparse",
    "dense",
    "svformer",
    "value-embedding",
    "fused-kv-lite",
)
"""The values that a layer n > 1 attends over. In every variant the first layer uses its own.

transformer      Vₙ
identity         0.5 V₁ + 0.5 Vₙ
constant         2 V₁ + Vₙ
learnable        λ₁ V₁ + λ₂ Vₙ, two learned scalars per layer, initially 0.5
learnable-plus   the same with a pair per KV head. The paper gives this name and its loss but no
                 formula. A pair per head contains Learnable, starts from the same values, shares
                 no state between layers and costs the kernel nothing.
sparse           5 V₁ + Vₙ in the last layers, Vₙ in the others
dense            Σᵢ λₙᵢ Vᵢ over all layers up to n, learned, initially 1/n
svformer         V₁; no value projection after the first layer
value-embedding  Vₙ + 3σ(W x) · E[token] on every second layer, counted back from the last
                 (nanochat); with an odd number of layers this includes the first
fused-kv-lite    Vₙ up to the middle layer m, V₁ above it; a layer above it attends with its own
                 queries over the rotated keys of m, and has no key and no value projection:
                 FusedKV-Lite (Lin et al., "Reconstructing KV Caches with Cross-layer Fusion for
                 Enhanced Transformers", arXiv 2512.03870)

Source: Zhou et al., "Value Residual Learning", arXiv 2410.17897, except for the last two.
"""


def default_sparse_layers(num_layers: int) -> int:
    """Number of last layers that mix in `sparse` by default: three eighths, at least one."""
    return min(num_layers - 1, max(1, round(3 * num_layers / 8)))


@dataclass(frozen=True)
class LanguageModelConfig:
    """A small decoder. Raises TypeError or ValueError where a field is of another type, or out of
    range.

    Attributes:
        variant: one of `VARIANTS`.
        vocab_size: distinct tokens.
        max_seqlen: maximum input length, in tokens.
        dim: channels of the residual stream.
        num_layers: blocks of attention and MLP.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads; None: num_heads.
        head_dim: channels per head; None: dim / num_heads.
        mlp: "swiglu", or "relu2" for down(relu(up(x))²) (So et al., arXiv 2109.08668).
        mlp_hidden: hidden channels of the MLP; None: 8/3 dim, rounded up to 16 (relu2: 4 dim).
        window_pattern: one letter per layer, repeated as needed: S attends to `short_window`
            keys, L to all. The last layer is always L, as in nanochat.
        short_window: keys that an S layer sees, including the query's own; None: max_seqlen / 2.
        qk_norm: RMS-normalise queries and keys.
        attention_scale: multiplies q.k; None: 1 / sqrt(head_dim).
        exclusive: None; a number, 1.0 for exclusive self-attention; or "learned" for one per head.
        gate: None, or a sigmoid gate on every attention's output: "head" or "channel".
        norm_eps: eps of every RMSNorm with weights; None: torch's, the dtype's machine epsilon.
        embedding_norm: RMS-normalise the embedded tokens, without weights.
        stream_scales: before layer n the stream becomes a_n times itself plus b_n times the
            embedded tokens, with a and b learned, initially 1 and 0 (nanochat).
        logit_softcap: logits become c tanh(logits / c); 0 for none.
        rope_base: the base of the rotary wavelengths.
        sparse_layers: number of last layers that mix in `sparse`; None: three eighths of all
            layers (the paper's best at 8 layers is to mix in layers 6 to 8).
        middle_layer: the last layer with keys and values of its own in `fused-kv-lite`, counted
            from 0; None: half of the layers have their own, as in its paper (of an odd number,
            the smaller half; one at least).
        gate_channels: input channels that the gate of `value-embedding` reads.
        gate_range: upper end of that gate's range, which starts at 0.
        checkpointing: recompute each block in backward (non-reentrant).
        backend: passed to the ops.
    """

    variant: str = "learnable"
    vocab_size: int = 256
    max_seqlen: int = 512
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp: str = "swiglu"
    mlp_hidden: int | None = None
    window_pattern: str = "L"
    short_window: int | None = None
    qk_norm: bool = False
    attention_scale: float | None = None
    exclusive: str | float | None = None
    gate: str | None = None
    norm_eps: float | None = None
    embedding_norm: bool = False
    stream_scales: bool = False
    logit_softcap: float = 0.0
    rope_base: float = 10_000.0
    sparse_layers: int | None = None
    middle_layer: int | None = None
    gate_channels: int = 32
    gate_range: float = 3.0
    checkpointing: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.mlp not in ("swiglu", "relu2"):
            raise ValueError(f"mlp must be 'swiglu' or 'relu2', got {self.mlp!r}")
        object.__setattr__(self, "exclusive", checked_exclusive(self.exclusive))
        checked_gate(self.gate)
        for field in fields(self):
            name, kind, value = field.name, str(field.type), getattr(self, field.name)
            if value is None and "None" in kind:
                continue
            # Python's own numbers, which a config.json can hold.
            if kind.startswith("int"):
                least = 0 if name == "middle_layer" else 1
                object.__setattr__(self, name, integer(name, value, least))
            elif kind.startswith("float"):
                object.__setattr__(self, name, real(name, value))
        if not 0 <= self.logit_softcap < math.inf:
            raise ValueError(f"logit_softcap must be 0 or more, got {self.logit_softcap}")
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise ValueError(
                f"window_pattern must be letters S and L, such as 'SSSL', got "
                f"{self.window_pattern!r}"
            )
        if self.sparse_layers is not None and self.sparse_layers > self.num_layers - 1:
            raise ValueError(
                f"sparse_layers must be at most num_layers - 1 = {self.num_layers - 1}, got "
                f"{self.sparse_layers}"
            )
        if self.middle_layer is not None and self.middle_layer >= self.num_layers:
            raise ValueError(
                f"middle_layer must be at most num_layers - 1 = {self.num_layers - 1}, got "
                f"{self.middle_layer}"
            )
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads {self.num_heads} where head_dim is None, "
                f"got {self.dim}"
            )

    @property
    def resolved_head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def resolved_kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def resolved_mlp_hidden(self) -> int:
        """Hidden channels of the MLP."""
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        if self.mlp == "relu2":
            return 4 * self.dim
        return -(-8 * self.dim // 3) + 15 & ~15

    @property
    def resolved_sparse_layers(self) -> int:
        """Number of last layers that mix in `sparse`."""
        return self.sparse_layers or default_sparse_layers(self.num_layers)

    @property
    def resolved_middle_layer(self) -> int:
        """The last layer with keys of its own, counted from 0: that of the model, except in
        `fused-kv-lite`."""
        if self.variant != "fused-kv-lite":
            return self.num_layers - 1
        if self.middle_layer is not None:
            return self.middle_layer
        return max(1, self.num_layers // 2) - 1

    def window(self, layer: int) -> tuple[int, int]:
        """The window of layer `layer`, counted from 0, as `value_residual_attention` takes it."""
        last = layer == self.num_layers - 1
        if last or self.window_pattern[layer % len(self.window_pattern)] == "L":
            return (-1, -1)
        short = self.short_window or max(1, self.max_seqlen // 2)
        return (short - 1, 0)
