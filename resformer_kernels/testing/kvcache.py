"""`attention_with_kvcache` compared with float64: cases as data, their inputs, the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import integer
from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.testing.budgets import Comparison, compared, misfit, norm
from resformer_kernels.testing.epilogue_terms import output_terms
from resformer_kernels.testing.inputs import add_epilogue, laid_out
from resformer_kernels.testing.poison import poisoned

CACHES = ("k_cache", "v_cache", "k_scale", "v_scale")
"""The arguments that a call writes and reads."""
APPENDS = ("both", "k", "v", "none")
MASKS = ("none", "left", "random", "empty")
"""key_mask: none; each sequence's first few tokens masked; any masked; all of them masked."""
CACHE_LAYOUTS = ("contiguous", "heads_first", "sliced")
_OPTIONS = ("causal", "window", "scale", "softcap", "num_splits", "return_lse")
"""Fields of a case that are arguments of the call."""

_ORDERS = 4


@dataclass(frozen=True)
class KVCacheCase:
    """The description of a call. Lengths are in tokens."""

    lengths: tuple[int, ...] = (20, 7)
    """Tokens in the cache of each sequence before the append."""
    q_len: int = 1
    new_tokens: int = 1
    append: str = "both"
    """The appended tensors: one of `APPENDS`."""
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    quantised: torch.dtype | None = None
    """The cache's dtype where it is not `dtype`."""
    page_size: int = 0
    """0: contiguous."""
    own_table: bool = False
    """Whether V's pages have a block table of their own."""
    packed: bool = False
    """q, k and v are packed: sequence b has b fewer queries and new tokens than the first."""
    out: bool = False
    """Whether a tensor for the result is given."""
    slack: int = 3
    """Capacity beyond the longest sequence."""
    mask: str = "none"
    mask_rank: int = 2
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    exclusive: str = "none"
    """One of `EXCLUSIVE_FORMS`, and `out_gate` one of `GATE_FORMS`."""
    out_gate: str = "none"
    num_splits: int = 0
    return_lse: bool = False
    length_form: str = "tensor"
    """Form of cache_seqlens: "tensor", or "int" where the lengths are equal."""
    layout: str = "contiguous"
    """Layout of q, k and v: one of `testing.LAYOUTS`."""
    cache_layout: str = "contiguous"
    seed: int = 0


REPRESENTATIVE: tuple[KVCacheCase, ...] = (
    KVCacheCase(lengths=(300, 5), head_dim=64, value_dim=64, return_lse=True),
    KVCacheCase(lengths=(700, 33), heads=8, append="k", page_size=16, num_splits=3, sinks=True),
    KVCacheCase(lengths=(90, 90), mask="left", window=(60, 0), softcap=20.0, page_size=8),
    KVCacheCase(lengths=(130, 40), q_len=50, new_tokens=50, head_dim=64, return_lse=True),
    KVCacheCase(lengths=(400, 60), quantised=torch.int8, head_dim=64, value_dim=64),
    KVCacheCase(lengths=(400, 60), quantised=torch.float8_e4m3fn, head_dim=64, value_dim=64),
    KVCacheCase(lengths=(60, 33), quantised=torch.float8_e5m2, page_size=16),
    KVCacheCase(
        lengths=(130, 40, 7), q_len=50, new_tokens=50, page_size=16, packed=True, own_table=True
    ),
    KVCacheCase(lengths=(300, 5), exclusive="one", out_gate="token_head", num_splits=2),
)
"""The cases of `verify` and the demo: every argument at least once."""


@dataclass(frozen=True)
class KVCacheInputs:
    """A call: `attention_with_kvcache(**tensors, **options)`."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def caches(self) -> dict[str, Tensor]:
        """The tensors that the call writes."""
        return {name: self.tensors[name] for name in CACHES if name in self.tensors}


def kvcache_inputs(case: KVCacheCase, device: torch.device | str = "cpu") -> KVCacheInputs:
    """Inputs for `case`. What the cache holds past a sequence's end is NaN."""
    draw = torch.Generator().manual_seed(integer("seed", case.seed))
    batch, longest = len(case.lengths), max(case.lengths, default=0) + case.new_tokens
    new = case.new_tokens if case.append != "none" else 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(case.dtype)

    tensors = {
        "q": laid_out(normal(batch, case.q_len, case.heads, case.head_dim), case.layout),
        **_caches(case, longest + case.slack, draw),
    }
    if case.append in ("both", "k"):
        tensors["k"] = laid_out(normal(batch, new, case.kv_heads, case.head_dim), case.layout)
    if case.append in ("both", "v"):
        tensors["v"] = laid_out(normal(batch, new, case.kv_heads, case.value_dim), case.layout)
    if case.sinks:
        tensors["sinks"] = torch.randn(case.heads, generator=draw)
    if case.mask != "none":
        tensors["key_mask"] = _mask(case, longest, draw)
    options = {name: getattr(case, name) for name in _OPTIONS}
    if case.length_form == "int":
        options["cache_seqlens"] = case.lengths[0]
    else:
        tensors["cache_seqlens"] = torch.tensor(case.lengths, dtype=torch.int32)
    inputs = KVCacheInputs(tensors, options)
    if case.page_size:
        inputs = paginated(inputs, case.page_size, case.seed, own_table=case.own_table)
    if case.packed:
        inputs = _packed(inputs, case)
    add_epilogue(draw, inputs.tensors, inputs.options, case, torch.float32)
    if case.out:
        shape = (*inputs.tensors["q"].shape[:-1], case.value_dim)
        inputs.tensors["out"] = laid_out(torch.full(shape, torch.nan, dtype=case.dtype), "sliced")
    caches = {
        name: x
        if x.dim() < 4 and case.cache_layout == "heads_first"
        else laid_out(x, case.cache_layout, fill=0)
        for name, x in inputs.caches().items()
    }
    tensors = {name: x.to(device) for name, x in {**inputs.tensors, **caches}.items()}
    return replace(inputs, tensors=tensors)


def _mask(case: KVCacheCase, longest: int, draw: torch.Generator) -> Tensor:
    batch = len(case.lengths)
    columns = torch.arange(longest)
    if case.mask == "left":
        starts = torch.randint(0, longest + 1, (batch, 1), generator=draw)
        mask = columns >= starts
    elif case.mask == "random":
        mask = torch.rand(batch, longest, generator=draw) < 0.7
    else:
        mask = torch.zeros(batch, longest, dtype=torch.bool)
    return mask[:, None, None] if case.mask_rank == 4 else mask


def _caches(case: KVCacheCase, capacity: int, draw: torch.Generator) -> dict[str, Tensor]:
    """k_cache and v_cache, contiguous, and their scales."""
    shape = (len(case.lengths), capacity, case.kv_heads)
    found: dict[str, Tensor] = {}
    for name, dim in (("k", case.head_dim), ("v", case.value_dim)):
        # If only the other of k and v is appended, this one has those tokens already.
        there = case.new_tokens if case.append in ("k", "v") and case.append != name else 0
        ends = torch.tensor(case.lengths, dtype=torch.int32) + there
        seen = torch.arange(capacity) < ends[:, None]
        if case.quantised is torch.int8:
            x = torch.randint(-127, 128, (*shape, dim), generator=draw).to(torch.int8)
        else:
            x = torch.randn(*shape, dim, generator=draw).to(case.quantised or case.dtype)
        if case.quantised is None:
            x = x.masked_fill(~seen[:, :, None, None], torch.nan)
        else:
            scale = torch.rand(shape, generator=draw) / 64
            found[f"{name}_scale"] = scale.masked_fill(~seen[:, :, None], torch.nan)
        found[f"{name}_cache"] = x
    return found


def _packed(inputs: KVCacheInputs, case: KVCacheCase) -> KVCacheInputs:
    """The same call with packed rows, and two rows after the last sequence."""
    tensors, options = dict(inputs.tensors), dict(inputs.options)
    for names, offsets in ((("q",), "cu_seqlens_q"), (("k", "v"), "cu_seqlens_k_new")):
        for name in names:
            if name not in tensors:
                continue
            x = tensors[name]
            counts = [max(0, x.shape[1] - b) for b in range(x.shape[0])]
            rows = [x[b, :count] for b, count in enumerate(counts)]
            after = x.new_full((2, *x.shape[2:]), torch.nan)
            tensors[name] = laid_out(torch.cat([*rows, after]), case.layout)
            tensors[offsets] = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    options["max_seqlen_q"] = case.q_len + 1
    return KVCacheInputs(tensors, options)


def paginated(
    inputs: KVCacheInputs, page_size: int, seed: int = 0, *, own_table: bool = False
) -> KVCacheInputs:
    """The same call on a paged cache, its pages in random order among unused ones."""
    draw = torch.Generator().manual_seed(seed)
    tensors = dict(inputs.tensors)
    batch, capacity = tensors["k_cache"].shape[:2]
    most = -(-capacity // page_size)
    t = torch.arange(capacity)
    tables: dict[str, Tensor] = {}
    for name, unused in (("block_table", 2), ("v_block_table", 5))[: 1 + own_table]:
        pages = batch * most + unused
        tables[name] = torch.randperm(pages, generator=draw)[: batch * most].view(batch, most).int()
    for name, x in inputs.caches().items():
        own = own_table and name.startswith("v")
        table = tables["v_block_table" if own else "block_table"]
        fill = torch.nan if x.is_floating_point() else 77
        paged = torch.full((batch * most + (5 if own else 2), page_size, *x.shape[2:]), fill)
        paged = paged.to(x.dtype)
        paged[table[:, t // page_size].long(), (t % page_size).expand(batch, -1)] = x
        tensors[name] = paged
    one = torch.tensor(inputs.options.get("cache_seqlens", 0))
    lengths = tensors.get("cache_seqlens", one)
    new = next((tensors[name].shape[1] for name in ("k", "v") if name in tensors), 0)
    used = torch.arange(most) * page_size < (lengths.expand(batch) + new)[:, None]
    tensors |= {name: table.masked_fill(~used, -7) for name, table in tables.items()}
    return replace(inputs, tensors=tensors)


def compare_kvcache(case: KVCacheCase, *, backend: str, device: str = "cpu") -> list[Comparison]:
    """One call against float64, and its caches against the reference's to the bit.

    Returns:
        A `Comparison` of out and, where the case asks for it, the LSE, within
        2 * error(reference in the same precision) + u(dtype) * norm (quantised: 2 u); and one of
        every cache, whose error counts the elements that differ and whose budget is 0.
    """
    inputs = kvcache_inputs(case, device)
    with poisoned():
        got, after = run_copied(inputs, backend)
    near, expected = run_copied(inputs, "reference")
    exact, _ = run_copied(_wide(inputs), "reference")
    # A quantised cache's scale multiplies a whole dot product: one rounding more.
    unit = torch.finfo(case.dtype).eps / 2 * (1 if case.quantised is None else 2)
    errors = {name: misfit(x, exact[name]) for name, x in near.items()}
    terms = output_terms(lambda wide: run_copied(wide, "reference")[0]["out"], _wide(inputs))
    found = compared(got, exact, errors, unit, terms)
    if not all(item.ok for item in found):
        # The reference's own error is luck: see `budgets`.
        luck = torch.Generator().manual_seed(0)
        for _ in range(_ORDERS):
            other = _reordered(inputs, luck)
            near, _ = run_copied(other, "reference")
            true, _ = run_copied(_wide(other), "reference")
            errors = {name: max(errors[name], misfit(x, true[name])) for name, x in near.items()}
        found = compared(got, exact, errors, unit, terms)
    for name, cache in expected.items():
        wrong = (_bits(cache) != _bits(after[name])).sum()
        found.append(Comparison(name, float(wrong), 0.0, norm(cache)))
    return found


def run_copied(inputs: KVCacheInputs, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({"out": ..., "lse": ...}, caches after) of a call on copies of the caches."""
    copies = {name: _copy(x) for name, x in inputs.caches().items()}
    arguments: dict[str, Any] = {**inputs.tensors, **copies, **inputs.options}
    if "out" in arguments:
        arguments["out"] = _copy(arguments["out"])
    with torch.no_grad():
        result = attention_with_kvcache(**arguments, backend=backend)
    named = dict(zip(("out", "lse"), result, strict=True)) if isinstance(result, tuple) else {}
    named = named or {"out": result}
    assert "out" not in arguments or named["out"] is arguments["out"]
    return named, copies


def _copy(x: Tensor) -> Tensor:
    """A copy with equal strides."""
    storage = x.new_zeros(x.untyped_storage().nbytes() // x.element_size())
    copy = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    return copy.copy_(x)


def _bits(x: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(kinds[x.element_size()])


def _wide(inputs: KVCacheInputs) -> KVCacheInputs:
    keep = ("k_scale", "v_scale")
    quantised = "k_scale" in inputs.tensors
    tensors = {
        name: x.double()
        if x.is_floating_point() and name not in keep and not (quantised and name in CACHES)
        else x
        for name, x in inputs.tensors.items()
    }
    return KVCacheInputs(tensors, inputs.options)


def _reordered(inputs: KVCacheInputs, luck: torch.Generator) -> KVCacheInputs:
    """The same problem up to rounding: other orders of channels, queries a little longer."""
    keys = torch.randperm(inputs.tensors["q"].shape[-1], generator=luck)
    values = torch.randperm(inputs.tensors["v_cache"].shape[-1], generator=luck)
    orders: Mapping[str, Tensor] = {
        **dict.fromkeys(("q", "k", "k_cache"), keys),
        **dict.fromkeys(("v", "v_cache", "out_gate"), values),
    }
    tensors = {
        name: x[..., orders[name].to(x.device)] if name in orders and x.shape[-1] > 1 else x
        for name, x in inputs.tensors.items()
    }
    tensors["q"] = tensors["q"] * (1 + (float(torch.rand((), generator=luck)) - 0.5) / 16)
    return replace(inputs, tensors=tensors)
