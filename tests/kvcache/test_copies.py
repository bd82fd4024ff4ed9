"""Copies of a cache, and of what the host module makes: equal, independent, at any point."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from resformer_kernels import SharedValueCache
from resformer_kernels.kvcache.cache import pages
from tests.kvcache.cache_model import DIM, HEADS, LAYOUTS, Driver, contents, new_cache


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.fixture(params=[copy.copy, copy.deepcopy, pickled])
def twin_of(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """A way to copy."""
    way: Callable[[Any], Any] = request.param
    return way


def described(cache: SharedValueCache) -> tuple[Any, ...]:
    """All that a cache says of itself."""
    open_step = cache._transactions.open
    step = None if open_step is None else (open_step.sequences, open_step.written)
    return cache.layout, cache.sequences, cache.lengths, cache.utilisation, repr(cache), step


def assert_equal(one: SharedValueCache, other: SharedValueCache) -> None:
    assert described(one) == described(other)
    for x, y in zip(contents(one), contents(other), strict=True):
        assert torch.equal(x.float(), y.float())


@pytest.mark.parametrize("layout", ["svformer", "cla"])
def test_a_copy_lives_on_by_itself(layout: str, paged: bool, twin_of: Callable[[Any], Any]) -> None:
    driver = Driver(new_cache(LAYOUTS[layout], paged, rows=4))
    luck = random.Random(1)
    for _ in range(12):
        driver.act(luck)
    before = described(driver.cache), contents(driver.cache)
    twin = Driver(twin_of(driver.cache), held=dict(driver.held))
    twin.held = dict(driver.held)
    assert_equal(twin.cache, driver.cache)
    fate = random.Random(2)
    for _ in range(12):
        twin.act(fate)
        twin.check()
    assert described(driver.cache) == before[0]
    for one, other in zip(contents(driver.cache), before[1], strict=True):
        assert torch.equal(one, other)
    # What the same steps do to the first cache: rows and pages are taken in the same order.
    driver.generator = torch.Generator().manual_seed(0)
    fate = random.Random(2)
    for _ in range(12):
        driver.act(fate)
        driver.check()
    assert_equal(twin.cache, driver.cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn])
def test_within_a_step(dtype: torch.dtype, paged: bool, twin_of: Callable[[Any], Any]) -> None:
    cache = new_cache(LAYOUTS["svformer"], paged, dtype=dtype)
    driver = Driver(cache)
    for layer, (k, v) in enumerate(driver.tokens(2, 5)):
        cache.append(layer, k, v)
    (k, v), *rest = driver.tokens(2, 2)
    cache.append(0, k, v)
    other, undone = twin_of(cache), twin_of(cache)
    assert_equal(other, cache)
    undone.rollback()
    for layer, (k, v) in enumerate(rest, 1):
        q = driver.draw(2, 2, HEADS, DIM)
        one = cache.attend(layer, q, k, v, backend="reference")
        assert torch.equal(one, other.attend(layer, q, k, v, backend="reference"))
    assert cache.lengths == other.lengths == (7, 7)
    assert undone.lengths == (5, 5)
    assert_equal(other, cache)


def test_a_cache_without_sequences(paged: bool, twin_of: Callable[[Any], Any]) -> None:
    cache = new_cache(LAYOUTS["standard"], paged, batch=0, rows=2)
    twin = twin_of(cache)
    twin.add(2)
    Driver(twin).step(3)
    assert (cache.sequences, twin.lengths) == ((), (3, 3))


@pytest.mark.usefixtures("native")
def test_plans(twin_of: Callable[[Any], Any]) -> None:
    plan = pages.plan_decode([16_000, 100, 120, 15_000], 4, 64, max_groups=2)
    twin = twin_of(plan)
    assert (twin.keys_per_split, twin.efficiency) == (plan.keys_per_split, plan.efficiency)
    groups = [[(g.sequences, g.num_splits) for g in p.groups] for p in (plan, twin)]
    assert groups[0] == groups[1] != []
    group = twin_of(plan.groups[0])
    assert (group.sequences, group.num_splits) == groups[0][0]


@pytest.mark.usefixtures("native")
def test_tables_and_states_that_are_none() -> None:
    table = pages.page_table(6, 2)
    one, two = table.create(2)
    table.append([one, two], 3)
    table.fork(one)
    table.free([two])
    twin = pickled(table)
    assert twin.__getstate__() == table.__getstate__()
    assert twin.append([one], 3) == table.append([one], 3)
    assert twin.__getstate__() == table.__getstate__()
    num_pages, page_size, free, sequences, following = table.__getstate__()
    name, length, held = sequences[0]
    wrong: list[Any] = [
        (num_pages, page_size, [*free, free[0]], sequences, following),
        (num_pages, page_size, free[1:], sequences, following),
        (num_pages, page_size, [*free[1:], held[0]], sequences, following),
        (num_pages, page_size, [*free[1:], num_pages], sequences, following),
        (num_pages, page_size, free, [*sequences, sequences[0]], following),
        (num_pages, page_size, free, [(name, length, held[1:])], following),
        (num_pages, page_size, free, [(name, length, [-1, *held[1:]])], following),
        (num_pages, page_size, free, [(name, -1, [])], following),
        (num_pages, page_size, free, sequences, 0),
    ]
    for state in wrong:
        made = type(table).__new__(type(table))
        with pytest.raises(ValueError, match="state is not that of a page table"):
            made.__setstate__(state)
