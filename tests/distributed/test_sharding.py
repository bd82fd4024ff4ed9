"""Attention on DTensors: results and gradients are those of one process, however it is split."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.sharded import Given, attention, hold

pytestmark = pytest.mark.usefixtures("native")

B, H, T, K, D = 4, 4, 5, 4, 8
EVERYTHING: dict[str, Any] = {"return_lse": True, "return_mixed_value": True, "causal": True}
FORMS = [
    attention(lambda_v=Given("", ()), lambda_first=Given("hd", (K, 1)), sinks=Given("h", (H,)),
              **EVERYTHING),
    attention(lambda_v=Given("hd", (K, D)), lambda_first=Given("bthd", (B, T, 1, 1)),
              exclusive=Given("hd", (H, 1)), out_gate=Given("hd", (H, 1)), **EVERYTHING),
    attention(lambda_v=Given("bthd", (B, T, K, 1)), lambda_first=Given("bthd", (B, T, K, D)),
              exclusive=Given("bthd", (B, T, 1, 1)), out_gate=Given("bthd", (B, T, H, D)),
              attn_bias=Given("bhqk", (B, H, T, T)), return_lse=True),
    attention(exclusive=Given("bthd", (B, T, H, 1)), out_gate=Given("bthd", (B, T, H, 1)),
              attn_bias=Given("hqk", (H, 1, T)), softcap=3.0, window=(2, 1)),
    attention(exclusive=1.0, attn_bias=Given("bhqk", (B, 1, T, T), "mask"), lambda_v=0.3),
    attention(exclusive=Given("", ()), attn_bias=Given("k", (T,)), return_mixed_value=True),
]  # fmt: skip
"""Every argument of attention, in every form."""
SMALL = attention(batch=1, heads=2, kv_heads=2, time=3, lambda_v=Given("hd", (2, 1)))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_attention_moves_nothing_where_sequences_or_heads_are_split_alike(backend: str) -> None:
    forms, splits = (FORMS, "bh") if backend == "native" else ([SMALL], "h")
    calls = [(case, (split,), True) for case in forms for split in splits]
    hold((2,), calls, backend=backend)


def test_attention_on_a_mesh_of_two_axes() -> None:
    splits = (("b", "h"), ("h", "b"), ("b", "b"), ("h", "h"), ("", "h"), ("b", ""))
    hold((2, 2), [(case, split, True) for case in FORMS[:3] for split in splits])


def test_head_counts_that_do_not_divide() -> None:
    lse: dict[str, Any] = {"return_lse": True, "lambda_v": 0.3}
    whole = [
        attention(heads=8, kv_heads=4, lambda_v=Given("hd", (4, 1)), sinks=Given("h", (8,))),
        attention(heads=5, kv_heads=5, **lse),
        attention(heads=4, kv_heads=1, lambda_v=Given("hd", (1, 1)), **EVERYTHING),
        attention(heads=3, kv_heads=1, attn_bias=Given("hqk", (3, 5, 5)), **lse),
    ]
    gathered = [
        # Query heads would lie on other ranks than their KV head.
        attention(heads=9, kv_heads=3, **lse),
        attention(heads=6, kv_heads=3, sinks=Given("h", (6,))),
    ]
    hold((2,), [*((case, ("h",), True) for case in whole), *((x, ("h",), False) for x in gathered)])
    # Ranks would have no head: 3 of 4, and 4 of 3.
    hold(
        (4,),
        [
            (attention(heads=h, kv_heads=k, **lse), ("h",), still)
            for h, k, still in ((8, 4, True), (3, 3, False), (8, 2, False), (6, 6, False))
        ],
    )
    hold(
        (2, 2),
        [
            (attention(heads=h, kv_heads=k, **lse), split, still)
            for h, k, split, still in (
                (8, 2, ("b", "h"), True),
                (8, 2, ("h", "h"), False),
                (8, 4, ("h", "h"), True),
            )
        ],
    )


def test_batches_that_do_not_divide() -> None:
    forms = [
        attention(
            batch=b,
            sinks=Given("h", (4,)),
            lambda_v=Given("bthd", (b, 5, 1, 1)),
            attn_bias=Given("bhqk", (b, 1, 5, 5)),
            **EVERYTHING,
        )
        for b in (3, 5)
    ]
    hold((2,), [(case, ("b",), True) for case in forms])
    # The last ranks have no sequence.
    hold((4,), [(case, ("b",), True) for case in forms])
    hold((2, 2), [(forms[0], ("b", "b"), True), (forms[0], ("b", "h"), True)])
