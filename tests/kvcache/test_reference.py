"""The reference: what the cache holds afterwards, and attention over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import (
    attention_with_kvcache,
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.kvcache.reference import quantise
from resformer_kernels.testing.kvcache import KVCacheCase, kvcache_inputs, paginated, run_copied


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_decoding_step_by_step_equals_causal_attention() -> None:
    q, k, v = tokens(2, 12, 4, 8), tokens(2, 12, 2, 8, seed=1), tokens(2, 12, 2, 6, seed=2)
    k_cache = k.new_full((2, 15, 2, 8), torch.nan)
    v_cache = v.new_full((2, 15, 2, 6), torch.nan)
    sinks = tokens(4)
    expected = value_residual_attention(q, k, v, causal=True, window=(5, -1), sinks=sinks)
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
        part = slice(begin, end)
        out = attention_with_kvcache(
            q[:, part], k_cache, v_cache, k[:, part], v[:, part],
            cache_seqlens=begin, window=(5, -1), sinks=sinks, backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(out, expected[:, part])
    assert torch.equal(k_cache[:, :12], k)
    assert torch.equal(v_cache[:, :12], v)
    assert k_cache[:, 12:].isnan().all()


@pytest.mark.parametrize("exclusive", [1.0, "head", "token"])
def test_excluding_and_gating_step_by_step_equal_causal_attention(exclusive: Any) -> None:
    q, k, v = tokens(2, 12, 4, 8), tokens(2, 12, 2, 8, seed=1), tokens(2, 12, 2, 6, seed=2)
    own: Any = {"head": tokens(4, 1, seed=3), "token": tokens(2, 12, 4, 1, seed=3)}.get(
        exclusive, exclusive
    )
    gate = tokens(2, 12, 4, 6, seed=4)
    expected = value_residual_attention(
        q, k, v, causal=True, exclusive=own, exclusive_eps=2.0, out_gate=gate
    )
    k_cache, v_cache = k.new_full((2, 15, 2, 8), torch.nan), v.new_full((2, 15, 2, 6), torch.nan)
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        part = slice(begin, end)
        out = attention_with_kvcache(
            q[:, part], k_cache, v_cache, k[:, part], v[:, part], cache_seqlens=begin,
            exclusive=own[:, part] if exclusive == "token" else own, exclusive_eps=2.0,
            out_gate=gate[:, part], backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(out, expected[:, part])


@pytest.mark.parametrize("paged", [False, True])
def test_packed_rows_are_excluded_and_gated_as_in_attention(paged: bool) -> None:
    """Lengths of queries and keys: some queries have no key at their position."""
    q_lens, k_lens = (3, 1, 4), (7, 5, 2)
    q, k, v = tokens(8, 4, 8), tokens(14, 2, 8, seed=1), tokens(14, 2, 6, seed=2)
    factors: dict[str, Any] = {
        "exclusive": tokens(8, 4, 1, seed=3),
        "out_gate": tokens(8, 4, 6, seed=4),
    }
    cu_q = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    cu_k = torch.tensor([0, 7, 12, 14], dtype=torch.int32)
    expected, lse = value_residual_attention_varlen(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max(q_lens),
        max_seqlen_k=max(k_lens), causal=True, return_lse=True, **factors,
    )  # fmt: skip
    k_cache, v_cache = k.new_full((3, 8, 2, 8), torch.nan), v.new_full((3, 8, 2, 6), torch.nan)
    for i, (x, y) in enumerate(zip(k.split(k_lens), v.split(k_lens), strict=True)):
        k_cache[i, : len(x)], v_cache[i, : len(y)] = x, y
    table = None
    if paged:
        k_cache, v_cache = (x.view(6, 4, *x.shape[2:]) for x in (k_cache, v_cache))
        table = torch.arange(6, dtype=torch.int32).view(3, 2)
    got, got_lse = attention_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=torch.tensor(k_lens, dtype=torch.int32),
        block_table=table, cu_seqlens_q=cu_q, max_seqlen_q=5, return_lse=True,
        backend="reference", **factors,
    )  # fmt: skip
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_lse, lse.double())


def test_a_masked_position_has_nothing_to_exclude() -> None:
    q, k, v = tokens(1, 3, 2, 8), tokens(1, 9, 2, 8, seed=1), tokens(1, 9, 2, 6, seed=2)
    mask = torch.arange(9)[None] != 7
    k[:, 7], v[:, 7] = torch.nan, torch.nan
    arguments: dict[str, Any] = {"cache_seqlens": 9, "key_mask": mask, "backend": "reference"}
    plain = attention_with_kvcache(q, k, v, **arguments)
    out = attention_with_kvcache(q, k, v, exclusive=1.0, **arguments)
    torch.testing.assert_close(out[:, 1], plain[:, 1])
    own = v.repeat_interleave(1, dim=2)
    for query in (0, 2):
        along = (out[:, query] * own[:, 6 + query]).sum(-1)
        torch.testing.assert_close(along, torch.zeros_like(along))
        assert not torch.equal(out[:, query], plain[:, query])


def test_keys_alone_leave_the_values() -> None:
    k_cache, v_cache = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    k, v = torch.ones(1, 1, 1, 8), torch.full((1, 1, 1, 8), 2.0)
    q = torch.ones(1, 1, 1, 8)
    attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=0, backend="reference")
    deeper = torch.zeros(1, 4, 1, 8)
    out = attention_with_kvcache(q, deeper, v_cache, k, cache_seqlens=0, backend="reference")
    assert torch.equal(out, v)
    assert torch.equal(deeper, k_cache)


def test_a_page_is_where_the_table_says() -> None:
    k_cache, v_cache = torch.zeros(5, 2, 1, 3), torch.zeros(5, 2, 1, 3)
    k, v = torch.randn(2, 3, 1, 3), torch.randn(2, 3, 1, 3)
    table = torch.tensor([[4, 0, -1], [1, 3, 2]], dtype=torch.int32)
    lengths = torch.tensor([0, 2], dtype=torch.int32)
    q = torch.randn(2, 3, 1, 3)
    attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table, backend="reference"
    )
    assert torch.equal(k_cache[[4, 4, 0], [0, 1, 0]], k[0])
    assert torch.equal(v_cache[[3, 3, 2], [0, 1, 0]], v[1])
    assert (k_cache[1] == 0).all()


def test_paged_equals_contiguous() -> None:
    contiguous = kvcache_inputs(KVCacheCase(lengths=(40, 13), return_lse=True))
    expected = run_copied(contiguous, "reference")[0]
    for page_size in (1, 4, 64):
        got = run_copied(paginated(contiguous, page_size), "reference")[0]
        for name, right in expected.items():
            # Pages of 64 pad the rows with zeros, and BLAS sums rows of other lengths otherwise.
            torch.testing.assert_close(got[name], right, rtol=1e-6, atol=1e-7)


def test_a_mask_equals_leaving_the_keys_out() -> None:
    q, k, v = tokens(1, 1, 2, 8), tokens(1, 9, 2, 8, seed=1), tokens(1, 9, 2, 8, seed=2)
    mask = torch.arange(9)[None] >= 4
    k[:, :4], v[:, :4] = torch.nan, torch.inf
    for key_mask in (mask, mask[:, None, None]):
        out = attention_with_kvcache(
            q, k, v, cache_seqlens=9, key_mask=key_mask, backend="reference"
        )
        torch.testing.assert_close(out, value_residual_attention(q, k[:, 4:], v[:, 4:]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_token_comes_back_to_half_a_step(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 2, 64)
    x[0, 0] = 0
    codes, scales = quantise(x, dtype)
    back = codes.float() * scales[..., None]
    step = scales if dtype is torch.int8 else x.abs().amax(-1) / 8
    assert ((back - x).abs() <= step[..., None] * 0.5001).all()
    assert (scales[0, 0] == 0).all()


def test_an_odd_token_quantises_to_nan() -> None:
    for odd in (torch.nan, torch.inf):
        x = torch.randn(1, 1, 1, 8)
        x[..., 3] = odd
        codes, scales = quantise(x, torch.int8)
        assert (codes.float() * scales[..., None]).isnan().all()


def test_a_quantised_cache_attends_over_code_times_scale() -> None:
    case = KVCacheCase(quantised=torch.int8, append="none", lengths=(9, 9))
    inputs = kvcache_inputs(case)
    plain: dict[str, Any] = {**inputs.tensors, **inputs.options}
    for name in ("k", "v"):
        codes, scales = plain.pop(f"{name}_cache"), plain.pop(f"{name}_scale")
        plain[f"{name}_cache"] = codes.float() * scales[..., None]
    expected = attention_with_kvcache(**plain, backend="reference")
    assert torch.equal(run_copied(inputs, "reference")[0]["out"], expected)
