"""The attention layer of modded-nanogpt's record, written with this package.

Packed sequences, a window, RMS-normalised and half-rotated queries and keys, a gated value
embedding, exclusive self-attention (arXiv 2603.09078) with a learned share per head, and a sigmoid
gate per token and head: one call. The script computes a loss and its gradients with that call and
with the same steps as separate passes, prints the differences in float64, and times both in float32
(or `--dtype bfloat16`).

    python examples/speedrun_layer.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resformer_kernels import value_residual_attention_varlen

GATE_CHANNELS = 12
"""Channels of the layer's input that the gates read, as there."""
NORM_EPS = 1e-4
"""The least |v'|, as modded-nanogpt gives it to F.normalize; 1e-8 on its square elsewhere."""


class Packed(NamedTuple):
    """Documents one after the other."""

    token_ids: Tensor
    """(total,)."""
    cu_seqlens: Tensor
    """(documents + 1,) int32."""
    longest: int


class SpeedrunAttention(nn.Module):
    """One layer. Its input and output are (total, dim)."""

    def __init__(self, dim: int, heads: int, head_dim: int, vocab: int, window: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.window = heads, head_dim, window
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)
        self.value_embedding = nn.Embedding(vocab, heads * head_dim)
        self.value_gate = nn.Linear(GATE_CHANNELS, heads, bias=False)
        self.out_gate = nn.Linear(GATE_CHANNELS, heads, bias=False)
        self.alpha = nn.Parameter(torch.randn(heads, 1) / 2)
        # Half of the channels turn, the other half stand still.
        turning = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4)
        self.frequencies = torch.cat([turning, torch.zeros(head_dim // 4)])

    def operands(self, x: Tensor, packed: Packed) -> tuple[Tensor, ...]:
        """q, k, v, the embedded values, their gate and the output's: what both ways start from."""
        q, k, v = self.qkv(x).unflatten(1, (3 * self.heads, self.head_dim)).chunk(3, dim=1)
        q, k = (self._rotated(F.rms_norm(t, (self.head_dim,))) for t in (q, k))
        embedded = self.value_embedding(packed.token_ids).view_as(v)
        value_gate = 2 * torch.sigmoid(self.value_gate(x[:, :GATE_CHANNELS]))[..., None]
        out_gate = torch.sigmoid(self.out_gate(x[:, :GATE_CHANNELS]))[..., None]
        return q, k, v, embedded, value_gate, out_gate

    def _rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * self.frequencies.double()
        cos, sin = (f(angles).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:
        """The layer, with everything from the value embedding to the gate in one call."""
        q, k, v, embedded, value_gate, out_gate = self.operands(x, packed)
        y = value_residual_attention_varlen(
            q, k, v, embedded, 1.0, value_gate,
            cu_seqlens_q=packed.cu_seqlens, cu_seqlens_k=packed.cu_seqlens,
            max_seqlen_q=packed.longest, max_seqlen_k=packed.longest,
            causal=True, window=(self.window, 0), scale=0.12,
            exclusive=torch.tanh(self.alpha), exclusive_eps=NORM_EPS, out_gate=out_gate,
        )  # fmt: skip
        return self.o_proj(y.flatten(1))


def separate_passes(layer: SpeedrunAttention, x: Tensor, packed: Packed) -> Tensor:
    """The same layer with PyTorch's attention, one document at a time, and a pass for each step."""
    q, k, v, embedded, value_gate, out_gate = layer.operands(x, packed)
    v = v + value_gate * embedded
    documents = []
    for first, last in zip(packed.cu_seqlens[:-1], packed.cu_seqlens[1:], strict=True):
        rows = torch.arange(int(last - first))
        distance = rows[:, None] - rows
        seen = (distance >= 0) & (distance <= layer.window)
        one_q, one_k, one_v = (t[first:last].transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(one_q, one_k, one_v, attn_mask=seen, scale=0.12)
        documents.append(out[0].transpose(0, 1))
    y = torch.cat(documents)
    unit = F.normalize(v, dim=-1, eps=NORM_EPS)
    y = y - torch.tanh(layer.alpha) * (y * unit).sum(-1, keepdim=True) * unit
    return layer.o_proj((y * out_gate).flatten(1))


Layer = Callable[[SpeedrunAttention, Tensor, Packed], Tensor]
WAYS: dict[str, Layer] = {
    "one call": lambda layer, x, packed: layer(x, packed),
    "separate passes": separate_passes,
}


def loss_and_gradients(
    way: Layer, layer: SpeedrunAttention, x: Tensor, packed: Packed
) -> dict[str, Tensor]:
    """The loss, and its gradient for the input and each parameter, by name."""
    leaves = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    loss = way(layer, x, packed).square().mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def problem(
    arguments: argparse.Namespace, dtype: torch.dtype
) -> tuple[SpeedrunAttention, Tensor, Packed]:
    """A layer, its input and the documents, the same for every dtype."""
    torch.manual_seed(0)
    dim, heads, vocab = arguments.dim, arguments.heads, 512
    layer = SpeedrunAttention(dim, heads, dim // heads, vocab, arguments.window).to(dtype)
    lengths = [arguments.tokens // arguments.documents] * arguments.documents
    lengths[-1] += arguments.tokens - sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = Packed(torch.randint(vocab, (arguments.tokens,)), offsets, max(lengths))
    return layer, torch.randn(arguments.tokens, dim).to(dtype), packed


def differences(arguments: argparse.Namespace) -> dict[str, float]:
    """For the loss and each gradient, in float64: the largest difference over the largest entry."""
    given = problem(arguments, torch.float64)
    ours, theirs = (loss_and_gradients(way, *given) for way in WAYS.values())
    return {name: float((ours[name] - x).abs().max() / x.abs().max()) for name, x in theirs.items()}


def milliseconds(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """Medians of forward and backward, the two ways in turn."""
    given = problem(arguments, dtype)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for round_ in range(arguments.repeats + 1):
        for name, way in WAYS.items():
            start = time.perf_counter()
            loss_and_gradients(way, *given)
            if round_ > 0:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(samples) for name, samples in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare and time the two ways."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="in all documents (default 4096)")
    parser.add_argument("--documents", type=int, default=8, help="packed sequences (default 8)")
    parser.add_argument("--window", type=int, default=256, help="keys before a query (default 256)")
    parser.add_argument("--dim", type=int, default=768, help="channels (default 768)")
    parser.add_argument("--heads", type=int, default=6, help="heads (default 6)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the timing"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    arguments = parser.parse_args(argv)
    # float64 materialises its scores: fewer tokens say as much.
    small = argparse.Namespace(**{**vars(arguments), "tokens": min(arguments.tokens, 1024)})
    print("largest difference in float64, relative to the largest entry")
    for name, difference in differences(small).items():
        print(f"  {name:24} {difference:.1e}")
    times = milliseconds(arguments, getattr(torch, arguments.dtype))
    print(f"forward and backward of {arguments.tokens} tokens, {arguments.dtype}")
    for name, median in times.items():
        print(f"  {name:24} {median:8.1f} ms")
    print(f"  ratio                    {times['separate passes'] / times['one call']:8.2f}")


if __name__ == "__main__":
    main()
