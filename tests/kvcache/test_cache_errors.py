"""Every error of the cache is clear, and leaves the cache as it was, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import KVLayout, SharedValueCache
from resformer_kernels.kvcache import reference
from tests.kvcache.cache_model import (
    CAPACITY,
    DIM,
    HEADS,
    KV_HEADS,
    LAYOUTS,
    VALUE_DIM,
    Driver,
    contents,
    new_cache,
)


@pytest.fixture
def cache(paged: bool) -> SharedValueCache:
    """Two sequences of five tokens, SVFormer, three layers; a third row or page has room."""
    made = new_cache(LAYOUTS["svformer"], paged, rows=3)
    Driver(made).step(5)
    return made


def k(tokens: int = 1, batch: int = 2, **changes: Any) -> Tensor:
    return torch.randn(batch, tokens, KV_HEADS, DIM, **changes)


def v(tokens: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, KV_HEADS, VALUE_DIM)


def q(tokens: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, HEADS, DIM)


def state(cache: SharedValueCache) -> tuple[Any, ...]:
    return cache.sequences, cache.lengths, cache.utilisation, cache._transactions.open is None


def refuses(
    cache: SharedValueCache, error: type[Exception], said: str, call: Callable[[], object]
) -> None:
    before, tensors = state(cache), contents(cache)
    with pytest.raises(error, match=said):
        call()
    assert state(cache) == before
    for one, other in zip(contents(cache), tensors, strict=True):
        assert torch.equal(one, other)


def test_full(cache: SharedValueCache) -> None:
    room = CAPACITY - 5
    said = f"the cache is full: sequence 0 has 5 of {CAPACITY} tokens, and {room + 1} more"
    refuses(cache, RuntimeError, said, lambda: cache.append(0, k(room + 1), v(room + 1)))
    refuses(cache, RuntimeError, said, lambda: cache.attend(0, q(), k(room + 1), v(room + 1)))
    cache.append(0, k(room), v(room))


def test_out_of_pages(native: str) -> None:
    del native
    cache = new_cache(LAYOUTS["svformer"], True, pages=5)
    Driver(cache).step(6)  # two pages each
    said = "out of pages: 2 are needed, 1 of 5 are free"
    refuses(cache, RuntimeError, said, lambda: cache.append(0, k(3), v(3)))
    refuses(cache, RuntimeError, said, lambda: cache.attend(0, q(3), k(3), v(3)))
    cache.fork(0)
    cache.free(1)
    said = "out of pages: 5 are needed, 3 of 5 are free"
    refuses(cache, RuntimeError, said, lambda: cache.append(0, k(7), v(7)))


def test_no_row_left() -> None:
    cache = new_cache(LAYOUTS["svformer"], False)
    Driver(cache).step(2)
    said = "the cache is full: 1 more sequences were asked for, 0 of its 2 rows are free"
    refuses(cache, RuntimeError, said, cache.add)
    refuses(cache, RuntimeError, said, lambda: cache.fork(0))
    refuses(cache, RuntimeError, "1 more sequences", lambda: cache.reorder([0, 0, 1]))
    cache.reorder([0, 0])


def test_freed_and_unknown_sequences(cache: SharedValueCache) -> None:
    cache.free(1)
    for name, said in ((1, "sequence 1 was freed"), (99, "sequence 99 does not exist")):
        both = [0, name]
        calls: tuple[Callable[[], object], ...] = (
            partial(cache.fork, name),
            partial(cache.free, name),
            partial(cache.free, both),
            partial(cache.crop, 0, sequences=both),
            partial(cache.attend, 0, q(), sequences=both),
            partial(cache.append, 0, k(), v(), sequences=both),
        )
        for call in calls:
            refuses(cache, ValueError, said, call)
    refuses(cache, ValueError, "named twice", lambda: cache.free([0, 0]))
    refuses(cache, ValueError, "named twice", lambda: cache.attend(0, q(), sequences=[0, 0]))


def test_wrong_layer(cache: SharedValueCache) -> None:
    for layer in (3, -1):
        said = f"layer must be 0 to 2, got {layer}"
        refuses(cache, ValueError, said, partial(cache.append, layer, k(), v()))
        refuses(cache, ValueError, said, partial(cache.attend, layer, q()))
    refuses(cache, TypeError, "layer must be an int", lambda: cache.append("0", k(), v()))  # type: ignore[arg-type]
    said = "v must be None: layer 1 reads layer 0's values"
    refuses(cache, ValueError, said, lambda: cache.append(1, k(), v()))


def test_second_append(cache: SharedValueCache) -> None:
    cache.append(0, k(2), v(2))
    said = r"layer 0 has appended its keys in this step already; layers 1, 2 have yet to append"
    refuses(cache, RuntimeError, said, lambda: cache.append(0, k(2), v(2)))
    refuses(cache, RuntimeError, said, lambda: cache.attend(0, q(2), k(2), v(2)))
    refuses(cache, RuntimeError, "values in this step", lambda: cache.append(0, v=v(2)))


def test_within_a_step(cache: SharedValueCache) -> None:
    driver = Driver(cache)
    cache.append(0, k(2), v(2))
    assert cache.lengths == (5, 5)
    actions: list[Callable[[], object]] = [partial(cache.crop, 1), partial(cache.reorder, [0, 1])]
    actions += [partial(cache.fork, 0), partial(cache.free, 0), cache.add]
    for action in actions:
        refuses(cache, RuntimeError, "cannot be called within a step: layers 1, 2", action)
    said = "k and v must have the step's 2 tokens, got 1"
    refuses(cache, ValueError, said, lambda: cache.append(1, k()))
    said = r"sequences must be the step's, \(0, 1\), got \(0,\)"
    refuses(cache, ValueError, said, lambda: cache.append(1, k(2, 1), sequences=[0]))
    refuses(cache, ValueError, said, lambda: cache.attend(0, q(1, 1), sequences=[0]))
    said = "layer 1's keys of this step are missing: give k to the layer"
    refuses(cache, RuntimeError, said, lambda: cache.attend(1, q(2)))
    cache.rollback()
    assert cache.lengths == (5, 5)
    driver.held = {name: [] for name in cache.sequences}
    cache.rollback()
    cache.append(0, k(1), v(1))


def test_a_layer_may_not_read_what_is_not_there_yet(cache: SharedValueCache) -> None:
    said = "layer 1's values of this step are missing: give v to the layer whose slot it is"
    refuses(cache, RuntimeError, said, lambda: cache.attend(1, q(), k()))


@pytest.mark.parametrize(
    ("new", "error", "said"),
    [
        ({"k": k(batch=3)}, ValueError, "k must have a row for each of 2 sequences of the cache"),
        ({"v": v(batch=1)}, ValueError, r"got shape \(1, 1, 2, 12\): .*or make a cache of batch=1"),
        ({"k": torch.randn(2, 1, 4, DIM)}, ValueError, r"k must be \(2, T, 2, 8\)"),
        ({"k": k(0)}, ValueError, "T >= 1"),
        ({"k": k()[0]}, ValueError, r"k must be \(2, T, 2, 8\)"),
        ({"k": [1.0]}, TypeError, r"k must be a tensor \(2, T, 2, 8\)"),
        ({"v": k()}, ValueError, r"v must be \(2, T, 2, 12\)"),
        ({"k": k(2), "v": v(1)}, ValueError, "v must have k's 2 tokens"),
        ({"k": k(dtype=torch.bfloat16)}, TypeError, "k must have the cache's dtype torch.float32"),
        ({"k": k(device="meta")}, ValueError, "k must be on the cache's device cpu, got meta"),
        ({"k": k(requires_grad=True)}, RuntimeError, "k requires a gradient, and the cache has"),
        ({}, ValueError, "k and v are both None: there is nothing to append"),
    ],
)
def test_wrong_tensors(
    cache: SharedValueCache, new: dict[str, Any], error: type[Exception], said: str
) -> None:
    refuses(cache, error, said, lambda: cache.append(0, **new))
    if new:
        refuses(cache, error, said, lambda: cache.attend(0, q(), **new))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"window": (-2, 0)}, ValueError, "window takes sizes of 0 or more"),
        ({"num_splits": -1}, ValueError, "num_splits must be 0"),
        ({"backend": "none"}, ValueError, "backend must be 'auto' or one of"),
        ({"softcap": -1.0}, ValueError, "softcap must be 0"),
    ],
)
def test_what_the_op_refuses_appends_nothing(
    cache: SharedValueCache, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    refuses(cache, error, said, lambda: cache.attend(0, q(), k(), v(), **options))
    wrong = torch.randn(2, 1, HEADS, DIM + 1)
    refuses(cache, ValueError, "head_dim", lambda: cache.attend(0, wrong, k(), v()))
    said = "q must have a row for each of 2 sequences of the cache"
    refuses(cache, ValueError, said, lambda: cache.attend(0, q(batch=3), k(), v()))
    refuses(cache, ValueError, said, lambda: cache.attend(0, q(batch=1)))


def test_a_kernel_that_fails_leaves_no_step(
    cache: SharedValueCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_call: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(reference, "run", fail)
    attend = partial(cache.attend, backend="reference")
    refuses(cache, MemoryError, "no memory", lambda: attend(0, q(), k(), v()))
    cache.append(0, k(), v())
    refuses(cache, MemoryError, "no memory", lambda: attend(1, q(), k()))
    cache.append(1, k())


def test_quantised_caches_take_floats_alone(native: str) -> None:
    del native
    cache = new_cache(LAYOUTS["svformer"], True, dtype=torch.int8)
    codes = torch.zeros(2, 1, KV_HEADS, DIM, dtype=torch.int8)
    said = "k must be a float tensor, got torch.int8"
    refuses(cache, TypeError, said, lambda: cache.append(0, codes, v()))


def test_wrong_crops_and_picks(cache: SharedValueCache) -> None:
    said = "sequence 0 has 5 tokens and cannot be cropped to 6"
    refuses(cache, ValueError, said, lambda: cache.crop(6))
    refuses(cache, ValueError, "cannot be cropped to -1", lambda: cache.crop([3, -1]))
    said = "lengths must be an int or one for each of 2 sequences, got 1"
    refuses(cache, ValueError, said, lambda: cache.crop([3]))
    refuses(cache, ValueError, "picks must be 0 to 1, got 2", lambda: cache.reorder([0, 2]))
    refuses(cache, ValueError, "count must be at least 0, got -1", lambda: cache.add(-1))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"batch": None}, ValueError, "a cache takes batch and max_seqlen .contiguous., or"),
        ({"num_pages": 4}, ValueError, "got batch=1, max_seqlen=8, num_pages=4, page_size=None"),
        ({"batch": -1}, ValueError, "batch must be at least 0, got -1"),
        ({"max_seqlen": 0}, ValueError, "max_seqlen must be at least 1, got 0"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        ({"head_dim": 2.0}, TypeError, "head_dim must be an int, got 2.0"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32, .* got torch.int32"),
        ({"layout": 3}, TypeError, "layout must be a KVLayout, got 3"),
    ],
)
def test_bad_construction(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    sizes = {"batch": 1, "max_seqlen": 8, "num_kv_heads": 1, "head_dim": 4}
    arguments: dict[str, Any] = {"layout": KVLayout.standard(2), **sizes, **changes}
    with pytest.raises(error, match=said):
        SharedValueCache(**arguments)
