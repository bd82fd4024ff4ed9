"""`flash_attn_varlen_func` over pages, against FlashAttention's documentation, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import explain
from resformer_kernels.compat import flash_attn_3
from resformer_kernels.compat.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from tests.compat.documented import close, documented, offsets, rand

QUERIES, KEYS, HQ, HKV, D, DV = (3, 0, 1, 6), (5, 4, 7, 2), 4, 2, 8, 6


def paged(page_size: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Pages of keys and values, their table, and the keys and values of each sequence.

    Pages that no sequence has, and entries of the table past a sequence's end, hold nonsense.
    """
    most = -(-max(KEYS) // page_size)
    count = len(KEYS) * most + 1
    k, v = rand(count, page_size, HKV, D), rand(count, page_size, HKV, DV)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    table = order[: len(KEYS) * most].view(len(KEYS), most)
    k[order[-1]] = v[order[-1]] = torch.nan
    keys, values = ([x[table[b]].flatten(0, 1)[:n] for b, n in enumerate(KEYS)] for x in (k, v))
    used = torch.arange(most) * page_size < torch.tensor(KEYS)[:, None]
    return k, v, table.int().masked_fill(~used, -7), keys, values


@pytest.mark.parametrize("page_size", [1, 2, 4, 256])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window_size": (2, 3)},
        {"window_size": (1, 1), "softmax_scale": -0.4},
        {"softcap": 0.5, "softmax_scale": 2.0},
    ],
)
def test_meaning(page_size: int, options: dict[str, Any]) -> None:
    k, v, table, keys, values = paged(page_size)
    q, cu_q, cu_k = rand(sum(QUERIES), HQ, D), offsets(*QUERIES), offsets(*KEYS)
    out, lse, dropped = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 6, 7, **options, return_attn_probs=True, block_table=table
    )
    assert lse.shape == (HQ, sum(QUERIES))
    assert dropped.shape == (0,)
    for b in range(len(KEYS)):
        rows = slice(*cu_q[b : b + 2].tolist())
        expected_out, expected_lse = documented(q[rows], keys[b], values[b], **options)
        close(out[rows], expected_out)
        close(lse[:, rows], expected_lse)
    assert torch.equal(
        out, flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 7, **options, block_table=table)
    )


def test_sequences_may_share_pages(backend: str) -> None:
    """A prefix that two prompts have in common lies in memory once."""
    k, v = rand(3, 4, HKV, D).float(), rand(3, 4, HKV, DV).float()
    table = torch.tensor([[1, 0], [1, 2]], dtype=torch.int32)
    q, cu_q, cu_k = rand(5, HQ, D).float(), offsets(2, 3), offsets(6, 7)
    out = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 3, 7, causal=True, block_table=table, backend=backend
    )
    for b, length in enumerate((6, 7)):
        rows = slice(*cu_q[b : b + 2].tolist())
        mine = [x[table[b].long()].flatten(0, 1)[:length].double() for x in (k, v)]
        expected, _ = documented(q[rows].double(), mine[0], mine[1], causal=True)
        torch.testing.assert_close(out[rows].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_first_layers_values_alone() -> None:
    k, v, table, _, _ = paged(4)
    arguments = (offsets(*QUERIES), offsets(*KEYS), 6, 7)
    q = rand(sum(QUERIES), HQ, D)
    expected = flash_attn_varlen_func(q, k, v, *arguments, causal=True, block_table=table)
    found = flash_attn_varlen_func(
        q, k, None, *arguments, causal=True, block_table=table, v_first=v
    )
    assert torch.equal(found, expected)


def call(q: Tensor) -> Any:
    k, v, table, _, _ = paged(4)
    return flash_attn_varlen_func(
        q, k, v, offsets(*QUERIES), offsets(*KEYS), 6, 7, block_table=table
    )


def cached(q: Tensor) -> Any:
    return flash_attn_with_kvcache(q[None], rand(1, 9, HKV, D), rand(1, 9, HKV, DV))


def cached_3(q: Tensor) -> Any:
    return flash_attn_3.flash_attn_with_kvcache(
        q[None], rand(1, 9, HKV, D), rand(1, 9, HKV, DV), return_softmax_lse=True
    )[1]


@pytest.mark.parametrize("attend", [call, cached, cached_3])
def test_only_differentiating_the_result_raises(attend: Any) -> None:
    """FlashAttention computes it for tensors that require gradients, and has no backward either."""
    q = rand(sum(QUERIES), HQ, D)
    out = attend(q.clone().requires_grad_())
    assert torch.equal(out, attend(q))
    with pytest.raises(RuntimeError, match=r"over a cache .* has no gradient"):
        out.sum().backward()


def test_explain_understands_it(native: str) -> None:
    k, v, table, _, _ = paged(4)
    q = rand(sum(QUERIES), HQ, D).float()
    found = explain(
        flash_attn_varlen_func, q, k.float(), v.float(), offsets(*QUERIES), offsets(*KEYS), 6, 7,
        block_table=table,
    )  # fmt: skip
    assert found.op == "attention_with_kvcache"
    assert found.backend == native


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "both values": ({"v_first": rand(9, 4, HKV, DV)}, NotImplementedError, "v_first must be None"),
    "no pages": ({"k": rand(18, HKV, D)}, ValueError, r"k must be \(pages, page_size"),
    "channels": ({"k": rand(9, 4, HKV, 4)}, ValueError, "k must have q's head_dim 8"),
    "values' pages": ({"v": rand(8, 4, HKV, DV)}, ValueError, "v must have k's axes"),
    "a table's rank": ({"block_table": torch.zeros(4).int()}, ValueError, "block_table must be"),
    "a table's dtype": ({"block_table": torch.zeros(4, 2)}, TypeError, "block_table must be int32"),
    "a page": ({"block_table": torch.full((4, 2), 99).int()}, ValueError, "block_table must name"),
    "few pages": (
        {"block_table": torch.zeros(4, 1).int()},
        ValueError,
        "full.*cu_seqlens_k.*block_table",
    ),
    "offsets' dtype": ({"cu_seqlens_k": offsets(*KEYS).long()}, TypeError, "cu_seqlens_k must be"),
    "offsets that fall": (
        {"cu_seqlens_k": torch.tensor([0, 5, 4, 4, 4], dtype=torch.int32)},
        ValueError,
        "cu_seqlens_k must not decrease",
    ),
    "a bound": ({"max_seqlen_q": 5}, ValueError, "max_seqlen_q must be at least"),
    "a bound's type": ({"max_seqlen_k": 5.0}, TypeError, "max_seqlen_k must be an int"),
    "sequences": (
        {"cu_seqlens_k": offsets(3, 4)},
        ValueError,
        "cu_seqlens_k must have cu_seqlens_q's 5",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    changes, error, said = BAD[name]
    k, v, table, _, _ = paged(4)
    arguments: dict[str, Any] = {
        "q": rand(sum(QUERIES), HQ, D), "k": k, "v": v, "cu_seqlens_q": offsets(*QUERIES),
        "cu_seqlens_k": offsets(*KEYS), "max_seqlen_q": 6, "max_seqlen_k": 7, "block_table": table,
    }  # fmt: skip
    with pytest.raises(error, match=said):
        flash_attn_varlen_func(**{**arguments, **changes})
