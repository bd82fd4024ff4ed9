"""The native kernel beside its numbers: bits, splits, threads, schema, checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resformer_kernels import attention_with_kvcache
from resformer_kernels.kvcache.record import KVCacheCall
from resformer_kernels.testing.kvcache import (
    KVCacheCase,
    KVCacheInputs,
    kvcache_inputs,
    paginated,
    run_copied,
)
from tests.kvcache.cases import opcheck

LONG = KVCacheCase(
    lengths=(3000, 700), heads=8, kv_heads=4, head_dim=64, value_dim=64, return_lse=True
)


def outcome(inputs: KVCacheInputs, **options: Any) -> list[torch.Tensor]:
    changed = KVCacheInputs(inputs.tensors, {**inputs.options, **options})
    return list(run_copied(changed, "native")[0].values())


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [1, 9])
@pytest.mark.usefixtures("native", "cpu_path")
def test_paged_equals_contiguous_bit_for_bit(dtype: torch.dtype, q_len: int) -> None:
    case = KVCacheCase(**{**vars(LONG), "dtype": dtype, "q_len": q_len, "new_tokens": q_len})
    inputs = kvcache_inputs(case)
    for splits in (0, 1, 5):
        expected = outcome(inputs, num_splits=splits)
        for page_size in (1, 16, 50):
            assert same(outcome(paginated(inputs, page_size), num_splits=splits), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [1, 9])
@pytest.mark.usefixtures("native", "cpu_path")
def test_heads_first_equals_time_first_bit_for_bit(dtype: torch.dtype, q_len: int) -> None:
    for quantised in (None, torch.int8):
        new = 0 if quantised else q_len
        form = {"dtype": dtype, "q_len": q_len, "new_tokens": new, "quantised": quantised}
        both = [
            KVCacheCase(**{**vars(LONG), **form, "cache_layout": layout})
            for layout in ("contiguous", "heads_first")
        ]
        plain, turned = map(kvcache_inputs, both)
        assert turned.tensors["k_cache"].transpose(1, 2).is_contiguous()
        assert same(outcome(turned), outcome(plain))


@pytest.mark.usefixtures("native", "two_threads")
def test_threads_and_neighbours_change_no_bit() -> None:
    inputs = kvcache_inputs(LONG)
    expected = outcome(inputs)
    for _ in range(5):
        assert same(outcome(inputs), expected)
    torch.set_num_threads(1)
    assert same(outcome(inputs), expected)
    alone = {name: x[1:] if name != "sinks" else x for name, x in inputs.tensors.items()}
    out, lse = outcome(KVCacheInputs(alone, inputs.options))
    assert torch.equal(out, expected[0][1:])
    assert torch.equal(lse, expected[1][1:])


@pytest.mark.usefixtures("native")
def test_splits_differ_by_rounding_alone() -> None:
    inputs = kvcache_inputs(KVCacheCase(**{**vars(LONG), "sinks": True}))
    out, lse = outcome(inputs, num_splits=1)
    for splits in (2, 7, 64, 1024):
        other, other_lse = outcome(inputs, num_splits=splits)
        torch.testing.assert_close(other, out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other_lse, lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "everything", "int8"])
def test_opcheck(native: str, name: str) -> None:
    del native
    case = {
        "plain": KVCacheCase(append="none"),
        "everything": KVCacheCase(
            page_size=4, mask="left", sinks=True, return_lse=True, softcap=3.0, append="k"
        ),
        "int8": KVCacheCase(quantised=torch.int8),
    }[name]
    opcheck("resformer", case)


def ints(numbers: Any) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


UNSET: dict[str, Any] = {
    **dict.fromkeys(KVCacheCall._fields),
    **KVCacheCall._field_defaults,
    "max_seqlen_q": 1,
    "window_left": -1,
    "window_right": 0,
    "scale": 1.0,
    "softcap": 0.0,
    "num_splits": 0,
    "return_lse": False,
}
"""The arguments of a call that asks for nothing special."""


def test_the_op_checks_for_itself(native: str) -> None:
    del native
    q, k = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 2, 8)
    cache = torch.zeros(2, 8, 2, 8)
    paged = cache.view(4, 4, 2, 8)
    right = {"cache_seqlens": ints([3, 5]), "block_table": ints([[0, 1], [2, 3]])}
    whole = {"q": q, "k_cache": cache, "v_cache": cache.clone(), "k": k, "v": k}
    pages = {**whole, **right, "k_cache": paged, "v_cache": paged.clone()}
    rows = {"q": q.view(1, 2, 4, 8), "k": k.view(1, 2, 2, 8), "v": k.view(1, 2, 2, 8)}
    packed = {**pages, **rows, "cu_seqlens_q": ints([0, 1, 2]), "cu_seqlens_k_new": ints([0, 1, 2])}

    for given, change, said in (
        (whole, {"cache_seqlens": ints([3, 8])}, "sequence 1 has 8 tokens and 1 are appended"),
        (whole, {"cache_seqlens": ints([-1, 3])}, "sequence 0 has -1"),
        (pages, {"block_table": ints([[0, 1], [2, 9]])}, "block_table names page 9 for page 1 of"),
        (pages, {"v_block_table": ints([[0, 1], [2, 9]])}, "v_block_table names page 9 for page 1"),
        (whole, {"v_block_table": ints([[0], [1]])}, "v_block_table comes with block_table"),
        (pages, {"key_mask": torch.ones(1, 8).bool()}, "key_mask must be a bool"),
        (packed, {"cu_seqlens_q": ints([0, 1, 3])}, "cu_seqlens_q has 1 and then 3 at index 1"),
        (packed, {"cu_seqlens_q": ints([0, 2, 1])}, "cu_seqlens_q has 2 and then 1"),
        (packed, {"cu_seqlens_k_new": ints([-1, 1, 2])}, "cu_seqlens_k_new has -1 and then 1"),
        (packed, {"cu_seqlens_k_new": ints([0, 2])}, "cu_seqlens_k_new must be a contiguous"),
        (pages, {"out": torch.zeros(2, 1, 4, 7)}, "out"),
    ):
        call = KVCacheCall(**{**UNSET, "cache_seqlens": ints([3, 5]), **given, **change})
        with pytest.raises(RuntimeError, match=said):
            torch.ops.resformer.attention_with_kvcache.default(*call)
    assert (cache == 0).all()


@pytest.mark.usefixtures("native")
def test_decoding_equals_prefill() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 70, 4, 32), torch.randn(1, 70, 2, 32), torch.randn(1, 70, 2, 32)
    caches = torch.zeros(2, 1, 70, 2, 32)
    whole = attention_with_kvcache(q, caches[0], caches[1], k, v, cache_seqlens=0)
    again = torch.zeros(2, 1, 70, 2, 32)
    for t in range(70):
        now = slice(t, t + 1)
        out = attention_with_kvcache(
            q[:, now], again[0], again[1], k[:, now], v[:, now], cache_seqlens=t
        )
        torch.testing.assert_close(out, whole[:, now], rtol=1e-5, atol=1e-5)
    assert torch.equal(caches, again)
