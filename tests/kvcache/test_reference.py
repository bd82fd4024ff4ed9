"""The reference: what the cache holds afterwards, and attention over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import attention_with_kvcache, value_residual_attention
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
