"""The host module: the page allocator against a model in Python, and the decode planner."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from resformer_kernels.kvcache.cache import pages

PAGES, SIZE = 12, 4
# Numbers of the tokens written to a sequence, in order.
Tokens = tuple[int, ...]


@pytest.fixture(autouse=True)
def _host_module(native: str) -> None:
    del native  # where a compiler is, the host module must be too
    assert pages.unavailable_reason() is None


class PagesAgainstModel(RuleBasedStateMachine):
    """Sequences as tuples of tokens; a store of pages that follows what the allocator says."""

    def __init__(self) -> None:
        super().__init__()
        self.table = pages.page_table(PAGES, SIZE)
        self.model: dict[int, Tokens] = {}
        self.freed: set[int] = set()
        self.store = [[-1] * SIZE for _ in range(PAGES)]
        self.written = 0

    def pick(self, data: st.DataObject, least: int = 0) -> list[int]:
        names = st.lists(st.sampled_from(sorted(self.model)), unique=True, min_size=least)
        return data.draw(names if self.model else st.just([]))

    def snapshot(self) -> object:
        held = {name: (self.table.length(name), self.table.pages(name)) for name in self.model}
        return held, self.table.free_pages

    @rule(count=st.integers(0, 2))
    def create(self, count: int) -> None:
        for name in self.table.create(count):
            assert name not in self.model
            assert name not in self.freed
            self.model[name] = ()

    @rule(data=st.data(), tokens=st.integers(0, 9))
    def append(self, data: st.DataObject, tokens: int) -> None:
        names = self.pick(data)
        before = self.snapshot()
        holders = Counter(page for name in self.model for page in self.table.pages(name))
        wanted = 0
        for name in names:
            length = len(self.model[name])
            wanted += -(-(length + tokens) // SIZE) + length // -SIZE
            last = self.table.pages(name)[-1] if length else -1
            if tokens and length % SIZE and holders[last] > 1:
                holders[last] -= 1
                wanted += 1
        if wanted > self.table.free_pages:
            with pytest.raises(RuntimeError, match=f"out of pages: {wanted} are needed"):
                self.table.append(names, tokens)
            assert self.snapshot() == before
            return
        for source, target in self.table.append(names, tokens):
            self.store[target] = list(self.store[source])
        for name in names:
            held = self.table.pages(name)
            for _ in range(tokens):
                position = len(self.model[name])
                self.written += 1
                self.store[held[position // SIZE]][position % SIZE] = self.written
                self.model[name] += (self.written,)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        for name in self.pick(data)[:1]:
            self.model[self.table.fork(name)] = self.model[name]

    @rule(data=st.data(), share=st.floats(0, 1))
    def crop(self, data: st.DataObject, share: float) -> None:
        names = self.pick(data)
        lengths = [int(share * len(self.model[name])) for name in names]
        self.table.crop(names, lengths)
        for name, length in zip(names, lengths, strict=True):
            self.model[name] = self.model[name][:length]

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        names = self.pick(data)
        self.table.free(names)
        for name in names:
            del self.model[name]
        self.freed.update(names)

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        names = self.pick(data, 1)
        if not names:
            return
        picks = data.draw(st.lists(st.integers(0, len(names) - 1), max_size=4))
        contents = [self.model[names[pick]] for pick in picks]
        result = self.table.reorder(names, picks)
        for name in names:
            if name not in result:
                self.freed.add(name)
            del self.model[name]
        self.model.update(zip(result, contents, strict=True))

    @rule(data=st.data(), missing=st.booleans())
    def misuse(self, data: st.DataObject, missing: bool) -> None:
        if not missing and not self.freed:
            return
        name = 10**6 if missing else max(self.freed)
        said = f"sequence {name} " + ("does not exist" if missing else "was freed")
        before, names = self.snapshot(), [*self.pick(data), name]
        calls = (
            lambda: self.table.append(names, 1),
            lambda: self.table.free(names),
            lambda: self.table.crop(names, [0] * len(names)),
            lambda: self.table.reorder(names, [0]),
            lambda: self.table.fork(name),
            lambda: self.table.length(name),
        )
        for call in calls:
            with pytest.raises(ValueError, match=said):
                call()
        assert self.snapshot() == before

    @invariant()
    def tokens_are_where_the_block_table_says(self) -> None:
        used: set[int] = set()
        names = list(self.model)
        rows = pages.block_table(self.table, names, PAGES).tolist()
        for name, row in zip(names, rows, strict=True):
            tokens = self.model[name]
            assert self.table.length(name) == len(tokens)
            held = self.table.pages(name)
            assert len(held) == -(-len(tokens) // SIZE)
            assert row[: len(held)] == held
            assert not any(row[len(held) :])
            found = [self.store[row[i // SIZE]][i % SIZE] for i in range(len(tokens))]
            assert tuple(found) == tokens
            used.update(held)
        assert self.table.free_pages == PAGES - len(used)


TestPagesAgainstModel = PagesAgainstModel.TestCase
TestPagesAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="page_size must be 1 to 2147483647, got 0"):
        pages.page_table(4, 0)
    with pytest.raises(ValueError, match="num_pages must be 0 to 2147483647, got -1"):
        pages.page_table(-1, 4)
    table = pages.page_table(4, 4)
    one, two = table.create(2)
    table.append([one], 3)
    calls = {
        f"sequence {one} is named twice": lambda: table.append([one, two, one], 1),
        "tokens must be 0 to 2147483647, got -1": lambda: table.append([one], -1),
        "has 3 tokens and cannot be cropped to 4": lambda: table.crop([one], [4]),
        "lengths must be one for each of 1 sequences, got 2": lambda: table.crop([one], [0, 0]),
        "picks must be 0 to 1, got 2": lambda: table.reorder([one, two], [0, 2]),
    }
    for said, call in calls.items():
        with pytest.raises(ValueError, match=said):
            call()
    assert (table.length(one), table.free_pages) == (3, 3)


def test_block_table_is_cut_or_filled_to_its_width() -> None:
    table = pages.page_table(8, 2)
    names = table.create(2)
    table.append(names[:1], 5)
    assert pages.block_table(table, names, 4).tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert pages.block_table(table, names, 2).tolist() == [[0, 1], [0, 0]]
    assert pages.block_table(table, [], 4).shape == (0, 4)
    assert pages.block_table(table, names, 0).dtype is torch.int32


def test_a_million_page_operations_a_second() -> None:
    table = pages.page_table(4096, 16)
    names = table.create(32)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20):
            for _ in range(64):
                table.append(names, 16)
            table.crop(names, [0] * 32)
        best = max(best, 2 * 20 * 64 * 32 / (time.perf_counter() - start))
    assert best > 1e6


def test_missing_module_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MODULE", "resformer_kernels._no_host")
    pages._load.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="the host module is not built for Python 3"):
            pages.page_table(1, 1)
    finally:
        monkeypatch.undo()
        pages._load.cache_clear()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20_000), max_size=20),
    heads=st.integers(1, 8),
    workers=st.integers(1, 140),
    tile=st.sampled_from([1, 16, 64]),
    max_groups=st.integers(1, 4),
)
def test_plan_serves_every_sequence_once(
    lengths: list[int], heads: int, workers: int, tile: int, max_groups: int
) -> None:
    plan = pages.plan_decode(lengths, heads, workers, tile=tile, max_groups=max_groups)
    served = [place for group in plan.groups for place in group.sequences]
    assert sorted(served) == list(range(len(lengths)))
    assert len(plan.groups) <= max_groups
    assert 0 <= plan.efficiency <= 1.0
    splits = [group.num_splits for group in plan.groups]
    assert splits == sorted(splits, reverse=True)
    for group in plan.groups:
        assert group.sequences == sorted(group.sequences)
        assert all(lengths[i] <= group.num_splits * plan.keys_per_split for i in group.sequences)
    assert plan.keys_per_split % tile == 0


def test_plan_splits_what_is_long_and_keeps_the_rest_whole() -> None:
    (alone,) = pages.plan_decode([8192], 8, 132).groups
    assert 8 <= alone.num_splits <= 33
    (many,) = pages.plan_decode([1024] * 64, 8, 132).groups
    assert many.num_splits == 1
    ragged = pages.plan_decode([16_000, 100, 120, 15_000], 4, 64, max_groups=2)
    assert [group.sequences for group in ragged.groups] == [[0, 3], [1, 2]]
    assert ragged.groups[1].num_splits == 1
    assert pages.plan_decode([], 4, 64).groups == []


def test_plan_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="lengths must be at least 0, got -1"):
        pages.plan_decode([3, -1], 1, 1)
    for name in ("heads", "workers"):
        arguments = {"heads": 1, "workers": 1, name: 0}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            pages.plan_decode([3], **arguments)
