"""What a ring of attention moves and computes on many GPUs: a model on paper, not a measurement.

Bytes are those that `resformer_kernels.distributed.traffic` counts: a test holds the two together.
The table goes into resformer_kernels/distributed/README.md.
"""

from __future__ import annotations

from typing import NamedTuple

from resformer_kernels.bench.tables import markdown_rows


class Shape(NamedTuple):
    """Attention of a model, by default that of a Llama of eight billion parameters."""

    tokens: int
    """Of one sequence, over all ranks."""
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    element: int = 2
    """Bytes of one element."""


class Machine(NamedTuple):
    """A GPU and its links, from NVIDIA's data sheets of the H200 and of 400 Gb/s InfiniBand."""

    rate: float = 0.55 * 989e12
    """FLOP/s of attention: 55% of the dense bfloat16 peak, an assumption between the 35% of
    FlashAttention 2 and the 75% of FlashAttention 3 on an H100 (arXiv 2407.08608)."""
    node: float = 450e9
    """Bytes a second each way over NVLink."""
    network: float = 50e9
    """Bytes a second each way over one network card a GPU."""


def hop_bytes(shape: Shape, ranks: int, svformer: bool) -> float:
    """Bytes that a rank sends in one hop of the forward: half a shard of K and of what V' moves."""
    half = shape.tokens / (2 * ranks) * shape.kv_heads * shape.head_dim * shape.element
    return half * (1 if svformer else 2)


def forward_bytes(shape: Shape, ranks: int, svformer: bool) -> float:
    """Bytes that a rank sends in the forward of all layers, V_1's gathering included."""
    hops = 2 * (ranks - 1)
    first = hops * hop_bytes(shape, ranks, svformer=True) if svformer else 0.0
    return shape.layers * hops * hop_bytes(shape, ranks, svformer) + first


def backward_bytes(shape: Shape, ranks: int, svformer: bool) -> float:
    """Bytes that a rank sends in the backward of all layers: what moved, its gradients, and the
    gradient of V_1."""
    hops = 2 * (ranks - 1)
    each = 2 * hop_bytes(shape, ranks, svformer)
    first = hops * hop_bytes(shape, ranks, svformer=True) if svformer else 0.0
    return shape.layers * hops * each + first


def hop_flops(shape: Shape, ranks: int) -> float:
    """FLOPs of one hop of the forward under a causal mask, balanced: tokens²/(4 ranks²) pairs."""
    pairs = shape.tokens**2 / (4 * ranks**2)
    return 4.0 * shape.heads * pairs * shape.head_dim


def first_values_bytes(shape: Shape) -> float:
    """Bytes of the gathered V_1 that every rank of an SVFormer keeps."""
    return float(shape.tokens * shape.kv_heads * shape.head_dim * shape.element)


def sharded_step(parameters: float, ranks: int, tokens: int) -> tuple[float, float]:
    """Bytes that a rank receives or sends a step under FSDP2 in bfloat16 (parameters gathered for
    the forward and the backward, gradients scattered), and the FLOPs of its tokens."""
    return 3 * 2 * parameters * (ranks - 1) / ranks, 6 * parameters * tokens


def hidden_from(shape: Shape, machine: Machine, svformer: bool, link: float) -> float:
    """Tokens a rank from which a hop takes no longer than what is computed meanwhile."""
    sources = 1 if svformer else 2
    return sources * shape.element / 2 * shape.kv_heads / shape.heads * machine.rate / link


_CASES = (
    (8, 8, 65_536, "NVLink"),
    (64, 16, 131_072, "network"),
    (64, 64, 262_144, "network"),
    (1024, 64, 524_288, "network"),
    (1024, 256, 524_288, "network"),
    (1024, 256, 4_194_304, "network"),
)
"""(GPUs, ranks that share a sequence, its tokens, the slowest link of their ring)."""


def table() -> str:
    """Bytes and time of a hop against its compute, for both kinds of model."""
    machine = Machine()
    rows = []
    for gpus, ranks, tokens, link in _CASES:
        shape = Shape(tokens)
        speed = machine.node if link == "NVLink" else machine.network
        compute = hop_flops(shape, ranks) / machine.rate
        cells = []
        for svformer in (False, True):
            size = hop_bytes(shape, ranks, svformer)
            moving = size / speed
            bound = "compute" if moving <= compute else link
            cells.append(f"{size / 1e6:.1f} MB, {moving * 1e6:.0f} µs: {bound}")
        whole = f"{first_values_bytes(shape) / 2**30:.2f} GiB"
        rows.append(
            (f"{gpus}", f"{ranks}", f"{tokens:,}", link, f"{compute * 1e6:,.0f} µs", *cells, whole)
        )
    head = (
        *("GPUs", "ranks a sequence", "tokens", "link", "attention of a hop"),
        *("ResFormer sends", "SVFormer sends", "V₁ a rank"),
    )
    return markdown_rows(head, rows)


def thresholds() -> str:
    """Tokens a rank from which moving hides behind computing."""
    shape, machine = Shape(1), Machine()
    rows = []
    for name, speed in (("NVLink", machine.node), ("network", machine.network)):
        both = [hidden_from(shape, machine, svformer, speed) for svformer in (False, True)]
        rows.append((f"{name}, {speed / 1e9:.0f} GB/s", *(f"{x:,.0f}" for x in both)))
    return markdown_rows(("link", "ResFormer", "SVFormer"), rows)


def sharded_table() -> str:
    """FSDP2 of eight billion parameters: moving against computing at 8,192 tokens a rank."""
    machine, parameters, tokens = Machine(), 8e9, 8192
    rows = []
    for ranks, link in ((8, "NVLink"), (64, "network"), (1024, "network")):
        size, flops = sharded_step(parameters, ranks, tokens)
        moving = size / (machine.node if link == "NVLink" else machine.network)
        compute = flops / machine.rate
        bound = "compute" if moving <= compute else link
        rows.append(
            (f"{ranks}", link, f"{size / 1e9:.0f} GB", f"{moving:.2f} s", f"{compute:.2f} s", bound)
        )
    head = ("GPUs", "link", "moved a step", "moving", "computing", "bound by")
    return markdown_rows(head, rows)
