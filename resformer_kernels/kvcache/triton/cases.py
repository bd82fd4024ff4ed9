"""Configurations of the cache's Triton kernels for the compile check.

Each case is a call of the op on meta tensors; the launcher launches its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resformer_kernels._core.select import prepare
from resformer_kernels._triton.cases import CompileCase, case_from_launch
from resformer_kernels._triton.launch import Launch, assumed_capability, recorded_launches
from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.kvcache.record import KVCacheCall
from resformer_kernels.kvcache.triton.attend import attend

_CAPACITY = 8192
# Fewest rows of a tile whose products run on wgmma.
_WGMMA_ROWS = 64


@dataclass(frozen=True)
class _Call:
    """Properties of a call that decide what is compiled."""

    what: str
    batch: int = 1
    queries: int = 1
    group: int = 4
    heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    stored: torch.dtype | None = None
    page_size: int = 0
    packed: bool = False
    """Whether queries and new tokens are, as an engine has them."""
    own_table: bool = False
    """Whether V has a block table of its own."""
    window: int = -1
    mask: bool = False
    softcap: float = 0.0
    sinks: bool = False
    finished: str = ""
    """What follows attention: "both" exclusive and out_gate, a number for each query and head; the
    "gate" alone; "exclusive" alone, a number."""
    lse: bool = False
    shared: bool = False
    """Whether keys are appended alone, to layers that share their values."""
    main: bool = False

    @property
    def name(self) -> str:
        stored = "" if self.stored is None else f" on {_name(self.stored)}"
        return f"D{self.head_dim} {_name(self.dtype)}{stored} {self.what}"

    def record(self) -> KVCacheCall:
        """The call on meta tensors."""

        def tensor(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        rows: tuple[int, ...] = (self.batch, _CAPACITY)
        table = None
        if self.page_size:
            pages = _CAPACITY // self.page_size
            rows = (self.batch * pages, self.page_size)
            table = tensor(self.batch, pages, dtype=torch.int32)
        heads_q = self.heads * self.group
        cache, scales = (*rows, self.heads, self.head_dim), (*rows, self.heads)
        time: tuple[int, ...] = (self.batch, self.queries)
        offsets, longest = None, None
        if self.packed:
            time, longest = (self.batch * self.queries,), self.queries
            offsets = tensor(self.batch + 1, dtype=torch.int32)
        new = (*time, self.heads, self.head_dim)
        rows_q = tensor(*time, heads_q, 1)
        stored, coded = self.stored or self.dtype, self.stored is not None
        call: KVCacheCall = prepare(
            attention_with_kvcache,
            tensor(*time, heads_q, self.head_dim),
            tensor(*cache, dtype=stored),
            tensor(*cache, dtype=stored),
            tensor(*new),
            None if self.shared else tensor(*new),
            cache_seqlens=tensor(self.batch, dtype=torch.int32),
            block_table=table,
            v_block_table=table if self.own_table else None,
            cu_seqlens_q=offsets,
            max_seqlen_q=longest,
            cu_seqlens_k_new=offsets,
            key_mask=tensor(self.batch, _CAPACITY, dtype=torch.bool) if self.mask else None,
            window=(self.window, 0),
            softcap=self.softcap,
            sinks=tensor(heads_q, dtype=torch.float32) if self.sinks else None,
            exclusive={"both": rows_q, "exclusive": 1.0}.get(self.finished),
            out_gate=rows_q if self.finished in ("both", "gate") else None,
            k_scale=tensor(*scales, dtype=torch.float32) if coded else None,
            v_scale=tensor(*scales, dtype=torch.float32) if coded else None,
            return_lse=self.lse,
        ).call
        return call


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").removeprefix("float8_").removesuffix("fn")


def _calls() -> Iterator[_Call]:
    for head_dim in (64, 128, 256):
        yield _Call("split", head_dim=head_dim, main=True)
        yield _Call("whole", head_dim=head_dim, batch=64, main=True)
        yield _Call("prefill 256", head_dim=head_dim, queries=256, main=True)
        yield _Call("split, shared V", head_dim=head_dim, shared=True, main=True)
    for stored in (torch.int8, torch.float8_e4m3fn):
        yield _Call("split", stored=stored, main=True)
    yield _Call("pages of 256", page_size=256, main=True)
    yield _Call("pages of 16", page_size=16, main=True)
    for head_dim in (64, 128):
        served = _Call("packed", head_dim=head_dim, page_size=16, packed=True, main=True)
        yield replace(served, batch=64)
        yield replace(served, what="packed, shared V", batch=64, shared=True)
        # At D128 looking up pages of 16 spills a little on sm_80, sm_86, sm_120 and gfx9.
        yield replace(served, what="packed prompts", batch=8, queries=256, main=head_dim == 64)
    yield _Call("V's own table", page_size=16, packed=True, own_table=True, main=True)
    gated = _Call("pages of 16, XSA, gate", page_size=16, finished="both", main=True)
    yield gated
    yield replace(gated, what="packed, XSA, gate", packed=True, batch=64)
    yield replace(gated, what="whole, XSA, gate", page_size=0, batch=64)
    yield replace(gated, what="prefill 256, XSA, gate", page_size=0, queries=256)
    yield _Call("split, XSA by a number", finished="exclusive")
    yield _Call("split, gate", finished="gate")
    yield _Call("left padding", mask=True, main=True)
    yield _Call("window, softcap, sinks, LSE", window=1024, softcap=30.0, sinks=True, lse=True)
    yield _Call("whole, sinks, LSE", sinks=True, lse=True, batch=32)
    yield _Call("head dimension 80", head_dim=80)
    yield _Call("prefill 256", queries=256, stored=torch.int8)
    yield _Call("split", dtype=torch.float32)
    yield _Call("prefill 256", dtype=torch.float32, queries=256, head_dim=64)


def _kernel(launch: Launch) -> tuple[str, int]:
    """The name of a kernel, and the rows of its tile of scores: 0 where it has none."""
    name: str = launch.kernel.__name__.removesuffix("_kernel").replace("_", " ")
    if name != "attend":
        return name, 0
    rows: int = launch.kwargs["tile"].ROWS.value
    return f"attend, tiles of {rows}", rows


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every kernel of every call; a kernel that two calls share is a case of the first alone."""
    seen: set[str] = set()
    with assumed_capability((capability // 10, capability % 10)):
        for call in _calls():
            with recorded_launches() as launches:
                attend(call.record())
            for launch in launches:
                name, rows = _kernel(launch)
                case = case_from_launch(
                    f"{name}, {call.name}",
                    launch,
                    capability=capability,
                    main=call.main,
                    expects_mma=rows >= _WGMMA_ROWS and call.dtype is not torch.float32,
                )
                identity = repr(replace(case, name="", main=False))
                if identity not in seen:
                    seen.add(identity)
                    yield case
