"""`flash_attn_with_kvcache` against what FlashAttention 2's documentation says, in float64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import explain, value_residual_attention
from resformer_kernels.compat.flash_attn import flash_attn_with_kvcache
from tests.compat.documented import ADDED

B, T, HQ, HKV, D, NEW = 2, 12, 4, 2, 8, 3
SIGNATURE = (
    "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False"
)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def caches(rows: int = B) -> tuple[Tensor, Tensor]:
    return rand(rows, T, HKV, D, seed=1), rand(rows, T, HKV, D, seed=2)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def attended(q: Tensor, k: Tensor, v: Tensor, row: int, keys: slice, **options: Any) -> Any:
    """A row of q over some keys of the same row of k and v."""
    rows = slice(row, row + 1)
    return value_residual_attention(q[rows], k[rows, keys], v[rows, keys], **options)


def rotated(x: Tensor, places: list[int], cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (T, H, D), a channel pair at a time, as the documentation of rotary_interleaved says."""
    out, half = x.clone(), cos.shape[1]
    for t, place in enumerate(places):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            c, s = cos[place, i], sin[place, i]
            out[t, :, a] = x[t, :, a] * c - x[t, :, b] * s
            out[t, :, b] = x[t, :, a] * s + x[t, :, b] * c
    return out


def test_signature_is_flash_attentions() -> None:
    parameters = inspect.signature(flash_attn_with_kvcache).parameters.values()
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert ", ".join(shown) == SIGNATURE
    ours = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert ours == ADDED


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (3, 0)])
def test_appends_in_place_and_attends(causal: bool, window: tuple[int, int]) -> None:
    k_cache, v_cache = caches()
    before = k_cache.clone(), v_cache.clone()
    q, k, v = rand(B, NEW, HQ, D), rand(B, NEW, HKV, D, seed=3), rand(B, NEW, HKV, D, seed=4)
    lengths = (5, 8)
    theirs: dict[str, Any] = {"softmax_scale": 0.3, "return_softmax_lse": True}
    theirs |= {"causal": causal, "window_size": window, "softcap": 4.0}
    ours: dict[str, Any] = {"scale": 0.3, "return_lse": True}
    ours |= {"causal": causal, "window": window, "softcap": 4.0}
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=ints(*lengths), **theirs
    )
    for b, length in enumerate(lengths):
        for cache, new, old in ((k_cache, k, before[0]), (v_cache, v, before[1])):
            assert torch.equal(cache[b, length : length + NEW], new[b])
            assert torch.equal(cache[b, :length], old[b, :length])
            assert torch.equal(cache[b, length + NEW :], old[b, length + NEW :])
        expected = attended(q, k_cache, v_cache, b, slice(length + NEW), **ours)
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), expected)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("mode", ["causal", "window", "full"])
@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_rotary(interleaved: bool, mode: str, rotary_dim: int) -> None:
    k_cache, v_cache = caches()
    held = k_cache.clone()
    q, k, v = rand(B, NEW, HQ, D), rand(B, NEW, HKV, D, seed=3), rand(B, NEW, HKV, D, seed=4)
    angles = rand(T + 2, rotary_dim // 2, seed=5)
    cos, sin = angles.cos(), angles.sin()
    causal, window = mode == "causal", (4, 1) if mode == "window" else (-1, -1)
    options: dict[str, Any] = {"causal": causal, "window_size": window}
    options["rotary_interleaved"] = interleaved
    lengths = (5, 9)
    arguments = (q, k_cache, v_cache, k, v, cos, sin, ints(*lengths))
    out = flash_attn_with_kvcache(*arguments, **options)
    for b, length in enumerate(lengths):
        places = [length + i for i in range(NEW)]
        new = rotated(k[b], places, cos, sin, interleaved)
        torch.testing.assert_close(k_cache[b, length : length + NEW], new)
        # Without a causal mask or window, all queries have the first new token's position.
        q_places = [length] * NEW if mode == "full" else places
        turned = rotated(q[b], q_places, cos, sin, interleaved)
        keys = torch.cat([held[b, :length], new])[None]
        expected = value_residual_attention(
            turned[None],
            keys,
            v_cache[b : b + 1, : length + NEW],
            causal=causal,
            window=window,
        )
        torch.testing.assert_close(out[b : b + 1], expected)


def test_one_length_for_all_and_no_length() -> None:
    k_cache, v_cache = caches()
    q = rand(B, 1, HQ, D)
    one = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7)
    many = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=ints(7, 7))
    assert torch.equal(one, many)
    full = flash_attn_with_kvcache(q, k_cache, v_cache)
    torch.testing.assert_close(full, value_residual_attention(q, k_cache, v_cache))


def test_cache_batch_idx_names_rows() -> None:
    k_cache, v_cache = caches(5)
    others = k_cache[[0, 2, 4]].clone()
    q, k, v = rand(B, 1, HQ, D), rand(B, 1, HKV, D, seed=3), rand(B, 1, HKV, D, seed=4)
    rows, values = (x[[3, 1]].clone() for x in (k_cache, v_cache))
    lengths = ints(5, 8)
    expected = flash_attn_with_kvcache(q, rows, values, k, v, cache_seqlens=lengths, causal=True)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, cache_batch_idx=ints(3, 1), causal=True
    )
    torch.testing.assert_close(out, expected)
    assert torch.equal(k_cache[[3, 1]], rows)
    assert torch.equal(k_cache[[0, 2, 4]], others)


def test_cache_batch_idx_names_rows_of_a_table() -> None:
    """As FlashAttention 3 takes it; in FlashAttention 2 it is an error."""
    pages = rand(6, 4, HKV, D, seed=1), rand(6, 4, HKV, D, seed=2)
    table, rows = ints(5, 0, 3, 2, 4, 1).view(3, 2), ints(2, 0)
    q, k, v = rand(B, 1, HQ, D), rand(B, 1, HKV, D, seed=3), rand(B, 1, HKV, D, seed=4)
    expected_pages = [x.clone() for x in pages]
    options: dict[str, Any] = {"cache_seqlens": ints(3, 6), "causal": True}
    expected = flash_attn_with_kvcache(
        q, expected_pages[0], expected_pages[1], k, v, block_table=table[[2, 0]], **options
    )
    out = flash_attn_with_kvcache(
        q, *pages, k, v, block_table=table, cache_batch_idx=rows, **options
    )
    assert torch.equal(out, expected)
    assert all(torch.equal(x, y) for x, y in zip(pages, expected_pages, strict=True))


def test_cache_leftpad_hides_what_is_before() -> None:
    k_cache, v_cache = caches()
    k_cache[0, :3] = torch.nan
    q = rand(B, 2, HQ, D)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=ints(9, 7), cache_leftpad=ints(3, 0), causal=True
    )
    for b, (start, end) in enumerate(((3, 9), (0, 7))):
        expected = attended(q, k_cache, v_cache, b, slice(start, end), causal=True)
        torch.testing.assert_close(out[b : b + 1], expected)


def test_pages_of_any_size() -> None:
    k_cache, v_cache = caches()
    q, k, v = rand(B, 1, HQ, D), rand(B, 1, HKV, D, seed=3), rand(B, 1, HKV, D, seed=4)
    table = ints(5, 0, 3, 2, 4, 1).view(2, 3)
    paged = [torch.zeros(6, 4, HKV, D, dtype=torch.float64) for _ in range(2)]
    for pages, cache in zip(paged, (k_cache, v_cache), strict=True):
        pages[table.long()] = cache.view(B, 3, 4, HKV, D)
    lengths, pad = ints(5, 8), ints(1, 2)
    options: dict[str, Any] = {"cache_seqlens": lengths, "cache_leftpad": pad, "causal": True}
    expected = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options)
    out = flash_attn_with_kvcache(q, paged[0], paged[1], k, v, block_table=table, **options)
    torch.testing.assert_close(out, expected)
    assert torch.equal(paged[0][table.long()].view(B, T, HKV, D), k_cache)


def test_mixed_values_are_appended() -> None:
    k_cache, v_cache = caches()
    q, k, v = rand(B, NEW, HQ, D), rand(B, NEW, HKV, D, seed=3), rand(B, NEW, HKV, D, seed=4)
    v_first, gate = rand(B, NEW, HKV, D, seed=5), rand(B, NEW, HKV, 1, seed=6)
    mixed = 0.25 * v + gate * v_first
    expected_cache = k_cache.clone(), v_cache.clone()
    options: dict[str, Any] = {"cache_seqlens": ints(4, 9), "causal": True}
    expected = flash_attn_with_kvcache(q, *expected_cache, k, mixed, **options)
    mix: dict[str, Any] = {"v_first": v_first, "lambda_v": 0.25, "lambda_first": gate}
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options, **mix)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(v_cache, expected_cache[1])
    first_alone = v_cache.clone()
    flash_attn_with_kvcache(q, k_cache, first_alone, k, None, **options, v_first=v_first)
    assert torch.equal(first_alone[0, 4 : 4 + NEW], v_first[0])


def test_svformer_layers_share_one_v_cache() -> None:
    k_cache, v_cache = caches()
    later = k_cache.clone()
    q, k, v = rand(B, 1, HQ, D), rand(B, 1, HKV, D, seed=3), rand(B, 1, HKV, D, seed=4)
    lengths = ints(4, 9)
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)
    held = v_cache.clone()
    out = flash_attn_with_kvcache(q, later, v_cache, -k, cache_seqlens=lengths, causal=True)
    assert torch.equal(v_cache, held)
    for b, end in enumerate((5, 10)):
        expected = attended(q, later, v_cache, b, slice(end))
        torch.testing.assert_close(out[b : b + 1], expected)


def test_splits_agree_and_explain_computes_nothing() -> None:
    k_cache, v_cache = (x.float() for x in caches())
    q, k = rand(B, 1, HQ, D).float(), rand(B, 1, HKV, D, seed=3).float()
    angles = rand(T, D // 2).float()
    arguments = (q, k_cache, v_cache, k, k, angles.cos(), angles.sin(), ints(3, 7))
    held = k_cache.clone()
    assert explain(flash_attn_with_kvcache, *arguments).op == "attention_with_kvcache"
    assert torch.equal(k_cache, held)
    one, other = (flash_attn_with_kvcache(*arguments, num_splits=n) for n in (1, 3))
    torch.testing.assert_close(one, other)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ALiBi": ({"alibi_slopes": torch.ones(4)}, NotImplementedError, "alibi_slopes must be None"),
    "no lengths": ({"cache_seqlens": None}, ValueError, "cache_seqlens must be given where tokens"),
    "v alone": ({"k": None}, ValueError, "v must be None where k is"),
    "rotary without k": (
        {"k": None, "v": None, "rotary_cos": rand(T, 4), "rotary_sin": rand(T, 4)},
        ValueError,
        "rotary_cos and rotary_sin must be None without k",
    ),
    "cos alone": ({"rotary_cos": rand(T, 4)}, TypeError, "rotary_sin must be a tensor"),
    "short rotary": (
        {"rotary_cos": rand(T - 1, 4), "rotary_sin": rand(T - 1, 4)},
        ValueError,
        "rotary_cos must be .* at least the cache's 12 positions .* got .11, 4.",
    ),
    "wide rotary": (
        {"rotary_cos": rand(T, 5), "rotary_sin": rand(T, 5)},
        ValueError,
        "a rotary_dim of at most 8",
    ),
    "rotary dtype": (
        {"rotary_cos": rand(T, 4).half(), "rotary_sin": rand(T, 4)},
        TypeError,
        "rotary_cos must be float32 or q's dtype",
    ),
    "rows of a table": (
        {"cache_batch_idx": ints(0, 2), "block_table": ints(0, 1).view(2, 1)},
        ValueError,
        "cache_batch_idx must name rows 0 to 1 of block_table",
    ),
    "rows' dtype": (
        {"cache_batch_idx": torch.tensor([0, 1])},
        TypeError,
        "cache_batch_idx must be int32, got torch.int64",
    ),
    "leftpad's shape": ({"cache_leftpad": ints(1)}, ValueError, r"cache_leftpad must be \(2,\)"),
    "full": ({"cache_seqlens": 11}, ValueError, "the cache is full"),
    "interleaved": ({"rotary_interleaved": 1}, TypeError, "rotary_interleaved must be True or"),
    "window": ({"window_size": (-2, 0)}, ValueError, "window_size takes sizes of 0 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_nothing_is_written(name: str) -> None:
    changes, error, said = BAD[name]
    k_cache, v_cache = caches()
    held = k_cache.clone(), v_cache.clone()
    arguments: dict[str, Any] = {
        "k": rand(B, NEW, HKV, D),
        "v": rand(B, NEW, HKV, D),
        "cache_seqlens": 4,
        **changes,
    }
    with pytest.raises(error, match=said):
        flash_attn_with_kvcache(rand(B, NEW, HQ, D), k_cache, v_cache, **arguments)
    assert torch.equal(k_cache, held[0])
    assert torch.equal(v_cache, held[1])
