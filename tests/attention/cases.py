"""The sweep that every backend of attention goes through: a strategy and a table of cases."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from resformer_kernels.testing import BIAS_KINDS, COEFFICIENT_FORMS, LAYOUTS, AttentionCase
from resformer_kernels.testing.inputs import EXCLUSIVE_FORMS, GATE_FORMS

LENGTHS = st.one_of(
    st.sampled_from((0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129)), st.integers(1, 150)
)
FEW_TOKENS = st.sampled_from((0, 1, 2, 15, 16, 17, 31, 33, 50, 64, 65, 90))
"""For kernels that run in an interpreter."""
HEAD_DIMS = st.sampled_from((1, 3, 8, 16, 17, 32, 40, 64, 80, 128))
WINDOW_SIDES = st.sampled_from((-1, -1, 0, 1, 7, 20, 64, 200))


@st.composite
def attention_cases(
    draw: st.DrawFn,
    dtype: torch.dtype,
    packed: bool,
    biases: tuple[str, ...] = BIAS_KINDS,
    tokens: st.SearchStrategy[int] = LENGTHS,
    most: int = 3,
    epilogues: bool = True,
) -> AttentionCase:
    """Any combination of the arguments of the contract, in small sizes.

    `tokens` gives lengths, `most` is the most batch entries and KV heads. Without `epilogues`
    nothing follows the softmax.
    """
    few = range(1, most + 1)
    kv_heads = draw(st.sampled_from(few))
    lengths = None
    if packed:
        pair = st.tuples(tokens, tokens)
        lengths = tuple(draw(st.lists(pair, min_size=1, max_size=4)))
    return AttentionCase(
        batch=draw(st.sampled_from(few)),
        q_len=draw(tokens),
        k_len=draw(tokens),
        heads=kv_heads * draw(st.sampled_from((1, 2, 3))),
        kv_heads=kv_heads,
        head_dim=draw(HEAD_DIMS),
        value_dim=draw(HEAD_DIMS),
        dtype=dtype,
        sources=draw(st.sampled_from(("both", "both", "both", "v", "v_first"))),
        lambda_v=draw(st.sampled_from(COEFFICIENT_FORMS)),
        lambda_first=draw(st.sampled_from(COEFFICIENT_FORMS)),
        coefficient_dtype=draw(st.sampled_from(("float32", "same"))),
        causal=draw(st.booleans()),
        window=(draw(WINDOW_SIDES), draw(WINDOW_SIDES)),
        scale=draw(st.sampled_from((None, None, 0.3, -0.2, 0.0))),
        softcap=draw(st.sampled_from((0.0, 0.0, 2.0, 30.0))),
        sinks=draw(st.booleans()),
        bias=draw(st.sampled_from(("none", *biases))),
        exclusive=draw(st.sampled_from(("none", *EXCLUSIVE_FORMS) if epilogues else ("none",))),
        out_gate=draw(st.sampled_from(("none", *GATE_FORMS) if epilogues else ("none",))),
        zero_values=draw(st.booleans()),
        return_lse=draw(st.booleans()),
        return_mixed_value=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        grad_layout=draw(st.sampled_from(LAYOUTS)),
        lengths=lengths,
        tail=draw(st.sampled_from((0, 3))),
        slack=draw(st.sampled_from((0, 5))),
        seed=draw(st.integers(0, 2**16)),
    )


TABLE: dict[str, AttentionCase] = {
    "one token": AttentionCase(q_len=1, k_len=1),
    "one query": AttentionCase(q_len=1, k_len=300, causal=True),
    "no queries": AttentionCase(q_len=0, return_lse=True),
    "no keys": AttentionCase(k_len=0, return_lse=True, sinks=True),
    "no batch": AttentionCase(batch=0, return_lse=True, return_mixed_value=True),
    "several tiles": AttentionCase(q_len=513, k_len=700, causal=True, return_lse=True, sinks=True),
    "more queries than keys": AttentionCase(q_len=300, k_len=100, causal=True, return_lse=True),
    "narrow window": AttentionCase(q_len=500, k_len=500, window=(3, 2), return_lse=True),
    "window of the diagonal": AttentionCase(q_len=200, k_len=200, window=(0, 0)),
    # 16 query heads to a KV head: segments of 128 queries.
    "window in segments": AttentionCase(
        batch=2,
        heads=16,
        kv_heads=1,
        q_len=400,
        k_len=450,
        window=(29, 0),
        return_lse=True,
        sinks=True,
    ),
    "window in segments, both sides": AttentionCase(
        batch=1,
        heads=16,
        kv_heads=1,
        q_len=400,
        k_len=260,
        window=(11, 6),
        return_lse=True,
        lambda_v="full",
    ),
    "window in segments, packed": AttentionCase(
        heads=16,
        kv_heads=1,
        window=(20, 3),
        lengths=((300, 280), (5, 9), (150, 400)),
        return_lse=True,
    ),
    "window in segments, mixed value": AttentionCase(
        heads=16, kv_heads=1, q_len=300, k_len=333, window=(29, 0), return_mixed_value=True
    ),
    "window to the right only": AttentionCase(q_len=200, k_len=250, window=(-1, 5), sinks=True),
    "wide values": AttentionCase(head_dim=8, value_dim=256),
    "wide keys": AttentionCase(head_dim=256, value_dim=8, causal=True),
    "many query heads": AttentionCase(heads=16, kv_heads=1, q_len=70, k_len=70, causal=True),
    "few heads, long keys": AttentionCase(
        batch=1, heads=1, kv_heads=1, q_len=8, k_len=2000, return_lse=True, lambda_v="scalar"
    ),
    "every gradient": AttentionCase(
        q_len=130,
        k_len=150,
        lambda_v="full",
        lambda_first="token_head",
        sinks=True,
        bias="additive",
        softcap=10.0,
        causal=True,
        return_lse=True,
        return_mixed_value=True,
    ),
    "exclusive and gated": AttentionCase(
        q_len=130,
        k_len=150,
        heads=6,
        lambda_v="token_head",
        lambda_first="channel",
        causal=True,
        exclusive="token_head",
        out_gate="token_head",
        sinks=True,
        return_lse=True,
        return_mixed_value=True,
    ),
    "exclusive, more queries than keys": AttentionCase(
        q_len=200, k_len=90, exclusive="one", out_gate="full", causal=True, zero_values=True
    ),
    "exclusive, window in segments": AttentionCase(
        heads=16, kv_heads=1, q_len=400, k_len=333, window=(29, 3), exclusive="head"
    ),
    "exclusive, few heads": AttentionCase(
        batch=1, heads=1, kv_heads=1, q_len=8, k_len=2000, exclusive="scalar", out_gate="channel"
    ),
    "exclusive, packed": AttentionCase(
        lengths=((1, 70), (30, 30), (9, 2), (0, 4), (3, 0)),
        heads=6,
        causal=True,
        tail=4,
        exclusive="token",
        out_gate="full",
        slack=9,
    ),
    "packed, no sequence": AttentionCase(lengths=(), tail=5, return_lse=True, slack=1),
    "packed, empty sequences": AttentionCase(
        lengths=((0, 0), (0, 9), (9, 0), (3, 3)), return_lse=True, causal=True, sinks=True
    ),
    "packed, long and short": AttentionCase(
        lengths=((1, 700), (300, 300), (2, 2)), causal=True, tail=4, lambda_v="token", slack=9
    ),
}
"""Shapes at the edges, by name; each is run in every dtype."""
