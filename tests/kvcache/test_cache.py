"""SharedValueCache: what it holds, whatever is done to it, and what that costs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import KVLayout, SharedValueCache, value_residual_attention
from tests.kvcache.cache_model import (
    CAPACITY,
    DIM,
    HEADS,
    KV_HEADS,
    LAYOUTS,
    PAGE,
    VALUE_DIM,
    Driver,
    contents,
    new_cache,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("append", [False, True])
def test_steps_of_every_layout(layout: str, append: bool, paged: bool) -> None:
    driver = Driver(new_cache(LAYOUTS[layout], paged))
    for count in (5, 1, 1, 4, 1):
        driver.step(count, append=append)
        driver.check()


@pytest.mark.parametrize("seed", range(5))
def test_random_lives(seed: int, paged: bool) -> None:
    layout = LAYOUTS[["svformer", "standard", "svformer_cla", "fused_kv_lite"][seed % 4]]
    driver = Driver(new_cache(layout, paged, rows=4), seed)
    luck = random.Random(seed)
    for _ in range(25):
        driver.act(luck)
        driver.check()


@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_paged_equals_contiguous_bit_for_bit(
    backend: str, num_splits: int, dtype: torch.dtype, native: str
) -> None:
    del native
    caches = [new_cache(LAYOUTS["svformer"], form, dtype=dtype) for form in (False, True)]
    driver = Driver(caches[0])
    for count in (7, 1, 1):
        for layer, (k, v) in enumerate(driver.tokens(2, count)):
            q = driver.draw(2, count, HEADS, DIM)
            one, other = (
                cache.attend(layer, q, k, v, backend=backend, num_splits=num_splits)
                for cache in caches
            )
            assert torch.equal(one, other)


@pytest.mark.parametrize("layout", ["standard", "svformer", "svformer_cla"])
def test_excluded_and_gated_steps_equal_the_whole_sequence(layout: str, paged: bool) -> None:
    """A model's layers, token by token and in one call: each excludes its slot's own value."""
    cache, length = new_cache(LAYOUTS[layout], paged), 9
    driver = Driver(cache)
    tokens = driver.tokens(2, length)
    queries = [driver.draw(2, length, HEADS, DIM) for _ in tokens]
    exclusive = driver.draw(2, length, HEADS, 1).tanh()
    gates = driver.draw(2, length, HEADS, VALUE_DIM).sigmoid()
    found: list[list[Tensor]] = [[] for _ in tokens]
    for at in (slice(0, 5), slice(5, 6), slice(6, 9)):
        for layer, (k, v) in enumerate(tokens):
            k, v = (x if x is None else x[:, at] for x in (k, v))
            out = cache.attend(
                layer, queries[layer][:, at], k, v, exclusive=exclusive[:, at],
                exclusive_eps=0.5, out_gate=gates[:, at], backend="reference",
            )  # fmt: skip
            found[layer].append(out)
    slots = cache.layout
    for layer, q in enumerate(queries):
        k = tokens[slots.key_slots.index(slots.key_slots[layer])][0]
        v = tokens[slots.value_slots.index(slots.value_slots[layer])][1]
        assert k is not None
        whole = value_residual_attention(
            q, k, v, causal=True, exclusive=exclusive, exclusive_eps=0.5, out_gate=gates,
            backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(torch.cat(found[layer], dim=1), whole)


def test_forks_share_pages_until_they_differ() -> None:
    cache = new_cache(LAYOUTS["svformer"], True, batch=1)
    driver = Driver(cache)
    driver.step(2 * PAGE + 1)
    before = cache.utilisation
    twins = [cache.fork(cache.sequences[0]) for _ in range(3)]
    for twin in twins:
        driver.held[twin] = driver.held[cache.sequences[0]]
    assert cache.utilisation == before
    driver.step(1)
    # Three of the four copied the last page.
    assert cache.utilisation == pytest.approx(before + 3 / 40)
    driver.check()


def measured(cache: SharedValueCache) -> int:
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)


def sized(layout: KVLayout, dtype: torch.dtype, **form: int) -> SharedValueCache:
    sizes: dict[str, Any] = dict(form) or {"batch": 3, "max_seqlen": CAPACITY}
    return SharedValueCache(layout, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=dtype, **sizes)


@pytest.mark.parametrize("layers", [1, 2, 3, 12, 61])
def test_svformer_takes_exactly_its_share(layers: int) -> None:
    standard = sized(KVLayout.standard(layers), torch.bfloat16)
    shared = sized(KVLayout.svformer(layers), torch.bfloat16)
    assert standard.nbytes == measured(standard) == 2 * layers * 3 * CAPACITY * KV_HEADS * DIM * 2
    assert shared.nbytes == measured(shared)
    assert shared.nbytes * 2 * layers == standard.nbytes * (layers + 1)


@pytest.mark.parametrize(("layers", "middle"), [(1, 0), (2, 0), (12, 5), (61, 29), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_fused_kv_lite_takes_exactly_its_share(
    layers: int, middle: int, dtype: torch.dtype, paged: bool
) -> None:
    form = {"num_pages": 6, "page_size": 4} if paged else {}
    standard = sized(KVLayout.standard(layers), dtype, **form)
    shared = sized(KVLayout.fused_kv_lite(layers, middle), dtype, **form)
    assert shared.nbytes == measured(shared)
    assert shared.nbytes * layers == standard.nbytes * (middle + 1)


@pytest.mark.parametrize("layers", [2, 12])
def test_cla_and_int8_multiply(layers: int) -> None:
    standard = sized(KVLayout.standard(layers), torch.bfloat16)
    both = sized(KVLayout.svformer_cla(layers, 2), torch.int8)
    assert both.nbytes == measured(both)
    # Half the keys and one slot of values; a byte a channel and four a head instead of two.
    slots = (layers // 2 + 1) / (2 * layers)
    assert both.nbytes / standard.nbytes == pytest.approx(slots * (DIM + 4) / (2 * DIM), rel=1e-12)


def test_pages_take_what_they_hold(native: str) -> None:
    del native
    paged = sized(KVLayout.svformer(4), torch.float32, num_pages=6, page_size=4)
    assert paged.nbytes == measured(paged) == 5 * 6 * 4 * KV_HEADS * DIM * 4
    assert paged.keys.shape == (4, 6, 4, KV_HEADS, DIM)
    assert paged.values.shape == (1, 6, 4, KV_HEADS, DIM)


def test_utilisation(paged: bool) -> None:
    cache = new_cache(LAYOUTS["svformer"], paged)
    assert cache.utilisation == 0.0
    Driver(cache).step(5)
    assert cache.utilisation == pytest.approx(4 / 40 if paged else 10 / (2 * CAPACITY))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_within_its_bound(dtype: torch.dtype, paged: bool) -> None:
    exact, coarse = (new_cache(LAYOUTS["svformer"], paged, dtype=d) for d in (torch.float32, dtype))
    driver = Driver(exact)
    for count in (6, 1):
        new = driver.tokens(2, count)
        largest = max(float(v.abs().max()) for _, v in new if v is not None)
        for layer, (k, v) in enumerate(new):
            q = driver.draw(2, count, HEADS, DIM)
            one = exact.attend(layer, q, k, v)
            other = coarse.attend(layer, q, k, v, backend="reference")
            # Half a code of int8 is 1/254 of a token's largest value; float8 has 3 or 2 bits.
            bound = {torch.int8: 0.02, torch.float8_e4m3fn: 0.15, torch.float8_e5m2: 0.3}[dtype]
            assert float((one - other).abs().max()) < bound * largest
    assert coarse.key_scales is not None
    assert coarse.key_scales.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_append_writes_what_attend_writes(dtype: torch.dtype, paged: bool) -> None:
    first, second = (new_cache(LAYOUTS["svformer"], paged, dtype=dtype) for _ in range(2))
    driver = Driver(first)
    for layer, (k, v) in enumerate(driver.tokens(2, 5, torch.bfloat16)):
        first.append(layer, k, v)
        second.attend(layer, driver.draw(2, 5, HEADS, DIM).bfloat16(), k, v, backend="reference")
    for one, other in zip(contents(first), contents(second), strict=True):
        assert torch.equal(one, other)


def test_autocast_follows_the_cache(paged: bool) -> None:
    cache = new_cache(LAYOUTS["svformer"], paged)
    driver = Driver(cache)
    with torch.autocast("cpu", torch.bfloat16):
        for layer, (k, v) in enumerate(driver.tokens(2, 3, torch.bfloat16)):
            cache.append(layer, k, v)
    assert cache.lengths == (3, 3)
    assert cache.keys.dtype is torch.float32


def test_options_of_the_op_pass_through(paged: bool) -> None:
    cache = new_cache(LAYOUTS["svformer"], paged)
    driver = Driver(cache)
    driver.step(6)
    q = driver.draw(2, 1, HEADS, DIM)
    plain, lse = cache.attend(1, q, return_lse=True)
    assert lse.shape == (2, HEADS, 1)
    windowed = cache.attend(1, q, window=(2, 0), softcap=3.0, scale=0.3)
    assert not torch.allclose(plain, windowed)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, :3] = False
    torch.testing.assert_close(cache.attend(1, q, key_mask=mask), cache.attend(1, q, window=(2, 0)))


def test_repr_says_what_it_is(paged: bool) -> None:
    cache = new_cache(LAYOUTS["svformer"], paged)
    said = repr(cache)
    assert f"{cache.nbytes} bytes" in said
    assert ("paged" if paged else "contiguous") in said


def test_gpu_steps_are_planned(monkeypatch: pytest.MonkeyPatch, native: str) -> None:
    del native
    cache = new_cache(LAYOUTS["svformer"], True)
    monkeypatch.setattr(type(cache._transactions), "_plan", lambda _self, _chosen: 3)
    seen: list[int] = []
    from resformer_kernels.kvcache import reference

    run = reference.run

    def spy(call: Any) -> Any:
        seen.append(call.num_splits)
        return run(call)

    monkeypatch.setattr(reference, "run", spy)
    driver = Driver(cache)
    for count in (4, 1):
        for layer, (k, v) in enumerate(driver.tokens(2, count)):
            q = driver.draw(2, count, HEADS, DIM)
            cache.attend(layer, q, k, v, backend="reference")
    assert seen == [0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize("value_dim", [VALUE_DIM])
def test_values_may_have_another_size(value_dim: int, paged: bool) -> None:
    cache = new_cache(LAYOUTS["standard"], paged)
    assert (cache.keys.shape[-1], cache.values.shape[-1]) == (DIM, value_dim)
