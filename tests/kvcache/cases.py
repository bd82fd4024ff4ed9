"""The sweep that every backend of `attention_with_kvcache` goes through: cases as data."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from resformer_kernels import attention_with_kvcache
from resformer_kernels._core.select import prepare
from resformer_kernels.kvcache.op import op_arguments
from resformer_kernels.kvcache.record import KVCacheCall
from resformer_kernels.testing import LAYOUTS
from resformer_kernels.testing.inputs import EXCLUSIVE_FORMS, GATE_FORMS
from resformer_kernels.testing.kvcache import (
    APPENDS,
    CACHE_LAYOUTS,
    MASKS,
    KVCacheCase,
    KVCacheInputs,
    compare_kvcache,
    kvcache_inputs,
)

SWEEP = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""Settings of the backends' sweeps."""

LENGTHS = st.one_of(
    st.sampled_from((0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129)), st.integers(0, 300)
)
QUERIES = st.sampled_from((0, 1, 1, 1, 2, 3, 5, 17, 40))
HEAD_DIMS = st.sampled_from((1, 3, 8, 16, 17, 32, 40, 64, 80, 128))
WINDOW_SIDES = st.sampled_from((-1, -1, 0, 1, 7, 20, 64, 200))
PAGE_SIZES = st.sampled_from((0, 0, 1, 4, 16, 24))


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name in test ids."""
    return str(dtype).removeprefix("torch.")


def check(case: KVCacheCase, backend: str) -> None:
    """Hold a case against float64."""
    wrong = [str(row) for row in compare_kvcache(case, backend=backend) if not row.ok]
    assert not wrong, f"{case}: {wrong}"


def call_of(inputs: KVCacheInputs) -> KVCacheCall:
    """The record of a call."""
    call: KVCacheCall = prepare(attention_with_kvcache, **inputs.tensors, **inputs.options).call
    return call


def opcheck(namespace: str, case: KVCacheCase) -> None:
    """torch.library.opcheck of the op of `namespace`, without the NaN that caches hold."""
    arguments = tuple(
        x.nan_to_num(nan=0.5) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in op_arguments(call_of(kvcache_inputs(case)))
    )
    op = getattr(torch.ops, namespace).attention_with_kvcache.default
    torch.library.opcheck(op, arguments)


@st.composite
def kvcache_cases(
    draw: st.DrawFn,
    dtype: torch.dtype,
    quantised: torch.dtype | None = None,
    tokens: st.SearchStrategy[int] = LENGTHS,
    queries: st.SearchStrategy[int] = QUERIES,
    most: int = 3,
) -> KVCacheCase:
    """Any combination of the arguments of the contract, in small sizes.

    `tokens` gives lengths, `queries` counts of queries, `most` is the most sequences and KV heads.
    """
    kv_heads = draw(st.sampled_from(range(1, most + 1)))
    lengths = tuple(draw(st.lists(tokens, min_size=1, max_size=most)))
    same = draw(st.sampled_from((False, False, False, True)))
    q_len = draw(queries)
    return KVCacheCase(
        lengths=lengths[:1] * len(lengths) if same else lengths,
        q_len=q_len,
        new_tokens=draw(st.sampled_from((q_len, q_len, 1, 3))),
        append=draw(st.sampled_from(APPENDS)),
        heads=kv_heads * draw(st.sampled_from((1, 2, 3, 4, 8))),
        kv_heads=kv_heads,
        head_dim=draw(HEAD_DIMS),
        value_dim=draw(HEAD_DIMS),
        dtype=dtype,
        quantised=quantised,
        page_size=draw(PAGE_SIZES),
        own_table=draw(st.sampled_from((False, False, True))),
        packed=draw(st.sampled_from((False, False, True))),
        out=draw(st.sampled_from((False, False, True))),
        slack=draw(st.sampled_from((0, 3))),
        mask=draw(st.sampled_from(("none", "none", *MASKS))),
        mask_rank=draw(st.sampled_from((2, 4))),
        causal=draw(st.sampled_from((True, True, False))),
        window=(draw(WINDOW_SIDES), draw(WINDOW_SIDES)),
        scale=draw(st.sampled_from((None, None, 0.3, -0.2, 0.0))),
        softcap=draw(st.sampled_from((0.0, 0.0, 2.0, 30.0))),
        sinks=draw(st.booleans()),
        exclusive=draw(st.sampled_from(("none", *EXCLUSIVE_FORMS))),
        out_gate=draw(st.sampled_from(("none", *GATE_FORMS))),
        num_splits=draw(st.sampled_from((0, 0, 1, 2, 5))),
        return_lse=draw(st.booleans()),
        length_form="int" if same and draw(st.booleans()) else "tensor",
        layout=draw(st.sampled_from(LAYOUTS)),
        cache_layout=draw(st.sampled_from(CACHE_LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
    )


TABLE: dict[str, KVCacheCase] = {
    "one token": KVCacheCase(lengths=(0,), return_lse=True),
    "nothing cached, nothing new": KVCacheCase(lengths=(0, 0), append="none", return_lse=True),
    "nothing cached, a sink": KVCacheCase(lengths=(0,), append="none", return_lse=True, sinks=True),
    "no sequence": KVCacheCase(lengths=(), return_lse=True),
    "no query": KVCacheCase(q_len=0, return_lse=True),
    "a full cache": KVCacheCase(lengths=(31, 31), slack=0, length_form="int"),
    "full pages": KVCacheCase(lengths=(31, 15), slack=0, page_size=16),
    "pages of one token": KVCacheCase(lengths=(9, 0, 30), page_size=1),
    "keys alone": KVCacheCase(append="k", page_size=4),
    "values alone": KVCacheCase(append="v"),
    "several tiles": KVCacheCase(lengths=(700, 1), return_lse=True, sinks=True),
    "many splits": KVCacheCase(lengths=(700, 3), num_splits=37, return_lse=True, sinks=True),
    "more splits than tokens": KVCacheCase(lengths=(2, 0), num_splits=9, return_lse=True),
    "prefill": KVCacheCase(lengths=(0, 0), q_len=90, new_tokens=90, return_lse=True),
    "chunked prefill": KVCacheCase(
        lengths=(130, 64), q_len=70, new_tokens=70, page_size=16, heads=12, kv_heads=2
    ),
    "more queries than keys": KVCacheCase(
        lengths=(3, 0), q_len=20, new_tokens=2, return_lse=True, sinks=True
    ),
    "narrow window": KVCacheCase(
        lengths=(400, 2), q_len=5, new_tokens=5, window=(3, 2), causal=False, num_splits=2
    ),
    "window of the diagonal": KVCacheCase(lengths=(60, 9), q_len=8, new_tokens=8, window=(0, 0)),
    "left padding": KVCacheCase(lengths=(500, 500), mask="left", mask_rank=4, return_lse=True),
    "left padding and a window": KVCacheCase(lengths=(200, 180), mask="left", window=(30, 0)),
    "everything masked": KVCacheCase(mask="empty", return_lse=True),
    "multi-query": KVCacheCase(heads=16, kv_heads=1, lengths=(150, 33)),
    "many heads": KVCacheCase(heads=24, kv_heads=24, lengths=(40, 33)),
    "wide values": KVCacheCase(head_dim=8, value_dim=256),
    "wide keys": KVCacheCase(head_dim=256, value_dim=8),
    "prompts beside decoded tokens": KVCacheCase(
        lengths=(64, 0, 130), q_len=40, new_tokens=40, page_size=16, packed=True, return_lse=True
    ),
    "packed, split": KVCacheCase(
        lengths=(300, 200, 7), q_len=2, packed=True, num_splits=3, sinks=True, return_lse=True
    ),
    "packed, nothing new": KVCacheCase(
        lengths=(0, 9), q_len=0, new_tokens=0, packed=True, page_size=4, slack=0
    ),
    "packed, nothing new, no page": KVCacheCase(
        lengths=(0,), q_len=0, new_tokens=0, packed=True, page_size=4, slack=0
    ),
    "packed, no sequence": KVCacheCase(lengths=(), packed=True, return_lse=True),
    "packed, a mask": KVCacheCase(
        lengths=(90, 60), q_len=3, new_tokens=3, packed=True, mask="random", out=True
    ),
    "a table of V's own": KVCacheCase(lengths=(90, 0, 33), page_size=4, own_table=True),
    "keys alone beside V's own table": KVCacheCase(
        lengths=(90, 33), page_size=16, own_table=True, append="k", out=True, return_lse=True
    ),
    "decoded, excluded, gated": KVCacheCase(
        lengths=(300, 5), exclusive="one", out_gate="token_head", num_splits=3, return_lse=True
    ),
    "packed codes, excluded, gated": KVCacheCase(
        lengths=(90, 60, 0),
        q_len=3,
        new_tokens=3,
        page_size=16,
        packed=True,
        sinks=True,
        exclusive="head",
        out_gate="full",
    ),
    "more queries than keys, excluded": KVCacheCase(
        lengths=(3, 0), q_len=9, new_tokens=2, exclusive="token_head", out_gate="channel"
    ),
    "left padding, excluded": KVCacheCase(
        lengths=(60, 60), mask="left", q_len=40, new_tokens=40, exclusive="token"
    ),
    "every argument": KVCacheCase(
        lengths=(150, 77),
        q_len=3,
        new_tokens=3,
        page_size=16,
        mask="random",
        window=(100, 0),
        scale=0.2,
        softcap=5.0,
        sinks=True,
        exclusive="scalar",
        out_gate="head",
        num_splits=3,
        return_lse=True,
        layout="strided",
        cache_layout="sliced",
    ),
}
"""Shapes at the edges, by name; each is run in every dtype."""
