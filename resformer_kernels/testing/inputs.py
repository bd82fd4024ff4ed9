"""Inputs for the attention ops, made from a record that describes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import integer
from resformer_kernels.attention.api import (
    value_residual_attention,
    value_residual_attention_varlen,
)

COEFFICIENT_FORMS = (
    "float",
    "scalar",
    "head",
    "channel",
    "last",
    "token",
    "token_head",
    "full",
    "expanded",
)
"""Forms of a coefficient: float, (), (Hkv, 1), (Hkv, Dv), (Dv,), (B, Tk, 1, 1), (B, Tk, Hkv, 1),
(B, Tk, Hkv, Dv), and () expanded to the latter with strides of 0."""

EXCLUSIVE_FORMS = ("none", "one", "scalar", "head", "token", "token_head")
"""Forms of `exclusive`: None, 1.0, (), (Hq, 1), (B, Tq, 1, 1), (B, Tq, Hq, 1)."""

GATE_FORMS = ("none", "head", "channel", "token_head", "full")
"""Forms of `out_gate`: None, (Hq, 1), (Hq, Dv), (B, Tq, Hq, 1), (B, Tq, Hq, Dv); an eighth of the
numbers are 0."""

BIAS_KINDS = (
    "none",
    "mask",
    "padding",
    "empty_rows",
    "additive",
    "per_head",
    "per_key",
    "infinite",
)
"""attn_bias: none; a bool (B, Hq, Tq, Tk), (B, 1, 1, Tk), or (Tq, 1) mask, the latter with rows
that attend to nothing; an additive (B, Hq, Tq, Tk), (Hq, 1, Tk), (Tk,); a (1, 1, Tq, Tk) that
holds -inf."""

LAYOUTS = ("contiguous", "heads_first", "sliced", "strided", "expanded")
"""Layouts in memory: contiguous; (B, H, T, D) seen as (B, T, H, D); a slice of a larger tensor of
NaN; every other element of the last axis; one head seen as many (stride 0)."""


_OPTIONS = ("causal", "window", "scale", "softcap", "return_lse", "return_mixed_value")
"""Fields of a case that are arguments of the call."""


@dataclass(frozen=True)
class AttentionCase:
    """The description of an attention input. Lengths are in tokens."""

    batch: int = 2
    q_len: int = 33
    k_len: int = 33
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    sources: str = "both"
    """The values given: "both", "v" or "v_first"."""
    lambda_v: str = "float"
    lambda_first: str = "float"
    coefficient_dtype: str = "float32"
    """Dtype of tensor coefficients, sinks and additive biases: "float32" or "same"."""
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    bias: str = "none"
    exclusive: str = "none"
    out_gate: str = "none"
    zero_values: bool = False
    """Whether every third row of the values is zero."""
    return_lse: bool = False
    return_mixed_value: bool = False
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    lengths: tuple[tuple[int, int], ...] | None = None
    """(query length, key length) of each packed sequence; None: not packed."""
    tail: int = 0
    """Packed rows of NaN after the last sequence."""
    slack: int = 0
    """Tokens by which max_seqlen exceeds the longest packed sequence."""
    seed: int = 0

    @property
    def function(self) -> Callable[..., Any]:
        """The public function that takes such inputs."""
        return value_residual_attention if self.lengths is None else value_residual_attention_varlen


@dataclass(frozen=True)
class Inputs:
    """A call: `function(**tensors, **options)`. `grads` are for its outputs, in their order."""

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    grads: tuple[Tensor, ...] = ()


class _Source:
    """Random tensors of one case: same seed, same numbers, on any device."""

    def __init__(self, case: AttentionCase, device: torch.device | str) -> None:
        self.case = case
        self.device = device
        self.generator = torch.Generator().manual_seed(integer("seed", case.seed))

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def rows(self, shape: tuple[int, ...], layout: str, *, every_third: bool = False) -> Tensor:
        """Queries, keys, values or their gradients, NaN beyond the packed sequences; zero in
        `every_third` row."""
        x = self.normal(shape, self.case.dtype)
        if every_third:
            x[..., ::3, :, :] = 0
        x = _poison_tail(self.case, x)
        return laid_out(x.to(self.device), layout)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as cases are named by it: "float32"."""
    return str(dtype).removeprefix("torch.")


def laid_out(x: Tensor, layout: str, fill: float = torch.nan) -> Tensor:
    """x in one of `LAYOUTS`: the same numbers at other strides ("expanded": of head 0 alone).
    The gaps between them hold `fill`."""
    if layout == "heads_first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":
        base = x.new_full([size + 3 for size in x.shape], fill)
        return base[tuple(slice(1, 1 + size) for size in x.shape)].copy_(x)
    if layout == "strided":
        base = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), fill)
        return base[..., ::2].copy_(x)
    if layout == "expanded":
        return x[..., :1, :].contiguous().expand(x.shape)
    return x


def attention_inputs(case: AttentionCase, device: torch.device | str = "cpu") -> Inputs:
    """Tensors, options and output gradients for `case`, with rows beyond its sequences NaN."""
    source = _Source(case, device)
    if case.lengths is None:
        q_rows: tuple[int, ...] = (case.batch, case.q_len)
        k_rows: tuple[int, ...] = (case.batch, case.k_len)
    else:
        q_rows = (sum(q for q, _ in case.lengths) + case.tail,)
        k_rows = (sum(k for _, k in case.lengths) + case.tail,)
    v_shape = (*k_rows, case.kv_heads, case.value_dim)
    shapes = {
        "q": (*q_rows, case.heads, case.head_dim),
        "k": (*k_rows, case.kv_heads, case.head_dim),
        "v": v_shape,
        "v_first": v_shape,
    }
    absent = {"v": "v_first", "v_first": "v"}.get(case.sources)
    given = {name: shape for name, shape in shapes.items() if name != absent}
    zero = ("v", "v_first") if case.zero_values else ()
    tensors = {
        name: source.rows(shape, case.layout, every_third=name in zero)
        for name, shape in given.items()
    }
    options = {name: getattr(case, name) for name in _OPTIONS}
    if absent:
        options[absent] = None
    _add_coefficients(source, v_shape, tensors, options)
    _add_packing(source, tensors, options)
    _add_scores(source, tensors)
    add_epilogue(source.generator, tensors, options, case, _coefficient_dtype(case))
    out_shape = (*q_rows, case.heads, case.value_dim)
    lse_shape = (*q_rows[:-1], case.heads, q_rows[-1])
    grads = [source.rows(out_shape, case.grad_layout)]
    if case.return_lse:
        wide = torch.float64 if case.dtype is torch.float64 else torch.float32
        grads.append(source.normal(lse_shape, wide).to(device))
    if case.return_mixed_value:
        grads.append(source.rows(v_shape, case.grad_layout))
    return Inputs(case.function, tensors, options, tuple(grads))


def add_epilogue(
    draw: torch.Generator,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    case: Any,
    dtype: torch.dtype,
) -> None:
    """exclusive and out_gate of a case, NaN where q is NaN."""
    q = tensors["q"]
    *rows, heads, _ = q.shape
    forms: dict[str, tuple[int, ...]] = {
        "scalar": (),
        "head": (heads, 1),
        "channel": (heads, case.value_dim),
        "token": (*rows, 1, 1),
        "token_head": (*rows, heads, 1),
        "full": (*rows, heads, case.value_dim),
    }
    for name, form in (("exclusive", case.exclusive), ("out_gate", case.out_gate)):
        if form == "none":
            continue
        if form == "one":
            options[name] = 1.0
            continue
        x = torch.randn(forms[form], generator=draw).to(dtype)
        if name == "out_gate":
            x = x.masked_fill(torch.rand(x.shape, generator=draw) < 1 / 8, 0)
        if form in ("token", "token_head", "full"):
            nowhere = q.isnan().flatten(-2).all(-1)[..., None, None]
            x = x.to(q.device).masked_fill(nowhere, torch.nan)
        tensors[name] = x.to(q.device)


def _poison_tail(case: AttentionCase, x: Tensor) -> Tensor:
    if case.lengths is not None and case.tail:
        x[-case.tail :] = torch.nan
    return x


def _coefficient_dtype(case: AttentionCase) -> torch.dtype:
    return torch.float32 if case.coefficient_dtype == "float32" else case.dtype


def _add_coefficients(
    source: _Source, v_shape: tuple[int, ...], tensors: dict[str, Tensor], options: dict[str, Any]
) -> None:
    case = source.case
    rows, (heads, dim) = v_shape[:-2], v_shape[-2:]
    forms: dict[str, tuple[int, ...]] = {
        "scalar": (),
        "expanded": (),
        "head": (heads, 1),
        "channel": (heads, dim),
        "last": (dim,),
        "token": (*rows, 1, 1),
        "token_head": (*rows, heads, 1),
        "full": v_shape,
    }
    for name, form, value in (
        ("lambda_v", case.lambda_v, 0.7),
        ("lambda_first", case.lambda_first, -1.3),
    ):
        if form == "float" or case.sources != "both":
            options[name] = value
            continue
        x = source.normal(forms[form], _coefficient_dtype(case))
        if form in ("token", "token_head", "full"):
            x = _poison_tail(case, x)
        x = x.to(source.device)
        tensors[name] = x.expand(v_shape) if form == "expanded" else x


def _add_packing(source: _Source, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    lengths = source.case.lengths
    if lengths is None:
        return
    for which, name in enumerate("qk"):
        sizes = [pair[which] for pair in lengths]
        offsets = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
        tensors[f"cu_seqlens_{name}"] = offsets.to(source.device)
        options[f"max_seqlen_{name}"] = max(sizes, default=0) + source.case.slack


def _add_scores(source: _Source, tensors: dict[str, Tensor]) -> None:
    """Sinks and attn_bias."""
    case = source.case
    dtype = _coefficient_dtype(case)
    if case.sinks:
        tensors["sinks"] = source.normal((case.heads,), dtype).to(source.device)
    if case.bias == "none":
        return
    batch, q_len, k_len = case.batch, case.q_len, case.k_len
    if case.lengths is not None:
        batch = len(case.lengths)
        q_len = max((q for q, _ in case.lengths), default=0) + case.slack
        k_len = max((k for _, k in case.lengths), default=0) + case.slack
    shapes: dict[str, tuple[int, ...]] = {
        "mask": (batch, case.heads, q_len, k_len),
        "padding": (batch, 1, 1, k_len),
        "empty_rows": (q_len, 1),
        "additive": (k_len, batch, q_len, case.heads),
        "per_head": (case.heads, 1, k_len),
        "per_key": (k_len,),
        "infinite": (1, 1, q_len, k_len),
    }
    least = {"mask": -0.3, "padding": -0.3, "empty_rows": 0.0}.get(case.bias)
    bias = source.normal(shapes[case.bias], dtype if least is None else torch.float32)
    if least is not None:
        bias = bias > least
    elif case.bias == "additive":
        # Its axes lie in memory in another order, and its last one is not contiguous.
        bias = bias.permute(1, 3, 2, 0)
    elif case.bias == "infinite":
        bias = bias.masked_fill(bias < -0.5, -torch.inf)
    tensors["attn_bias"] = bias.to(source.device)


REPRESENTATIVE: tuple[AttentionCase, ...] = tuple(
    case
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for case in (
        AttentionCase(dtype=dtype),
        AttentionCase(dtype=dtype, q_len=257, k_len=257, causal=True, head_dim=64, value_dim=64),
        AttentionCase(dtype=dtype, sources="v", kv_heads=4, head_dim=128, value_dim=128),
        AttentionCase(dtype=dtype, sources="v_first", causal=True, return_lse=True),
        AttentionCase(dtype=dtype, lambda_v="scalar", lambda_first="scalar", causal=True),
        AttentionCase(dtype=dtype, lambda_v="token_head", lambda_first="head", window=(20, 0)),
        AttentionCase(dtype=dtype, lambda_v="full", lambda_first="channel", softcap=8.0),
        AttentionCase(dtype=dtype, sinks=True, return_lse=True, q_len=17, k_len=70, causal=True),
        AttentionCase(dtype=dtype, bias="additive", return_mixed_value=True, layout="heads_first"),
        AttentionCase(dtype=dtype, bias="empty_rows", q_len=70, k_len=17, causal=True),
        AttentionCase(
            dtype=dtype,
            lengths=((5, 5), (0, 3), (40, 40), (1, 70)),
            tail=3,
            causal=True,
            lambda_v="token",
            lambda_first="scalar",
            sinks=True,
            return_lse=True,
        ),
        AttentionCase(
            dtype=dtype, q_len=70, k_len=70, causal=True, exclusive="one", out_gate="token_head"
        ),
        AttentionCase(
            dtype=dtype,
            lengths=((5, 5), (9, 3), (40, 60)),
            tail=3,
            causal=True,
            lambda_v="token",
            exclusive="head",
            out_gate="full",
        ),
    )
)
"""Cases that together use every argument, quick enough to run on a user's machine."""
