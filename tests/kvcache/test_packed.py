"""Packed queries and new tokens: each sequence as a call of its own has it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from resformer_kernels import attention_with_kvcache, explain
from tests.backends import backend as backend  # Triton's interpreter too

CAPACITY, HQ, HKV, D, DV = 24, 4, 2, 8, 6


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def offsets(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


class Case(NamedTuple):
    """Sequences, and how many of their queries and new tokens are packed."""

    lengths: tuple[int, ...] = (5, 9, 0, 19)
    queries: tuple[int, ...] = (3, 0, 1, 5)
    new: tuple[int, ...] | None = None
    page_size: int = 0
    after: int = 0
    """Rows after the last sequence."""
    options: dict[str, Any] | None = None
    quantised: bool = False


CASES: dict[str, Case] = {
    "causal": Case(),
    "pages": Case(page_size=4),
    "pages of one token": Case(page_size=1, new=(2, 0, 3, 1)),
    "not causal": Case(options={"causal": False}),
    "a window": Case(options={"window": (3, 2), "causal": False}, page_size=8),
    "every option": Case(
        options={"window": (5, 0), "softcap": 2.0, "scale": 0.4, "num_splits": 3},
        new=(2, 1, 0, 5),
    ),
    "more queries than keys": Case(lengths=(2, 0, 1, 3), queries=(6, 2, 0, 4)),
    "rows after the last sequence": Case(new=(0, 3, 1, 2), after=3, page_size=4),
    "no queries": Case(queries=(0, 0, 0, 0), new=(1, 2, 0, 4)),
    "nothing new": Case(new=(0, 0, 0, 0), after=2),
    "one sequence": Case(lengths=(7,), queries=(4,), new=(4,)),
    "int8": Case(new=(2, 0, 3, 1), quantised=True),
}


def held(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Contiguous caches of the case."""
    shape = (len(case.lengths), CAPACITY, HKV)
    if not case.quantised:
        return {"k_cache": rand(*shape, D).to(dtype), "v_cache": rand(*shape, DV, seed=1).to(dtype)}
    return {
        "k_cache": (rand(*shape, D) * 40).to(torch.int8),
        "v_cache": (rand(*shape, DV) * 40).to(torch.int8),
        "k_scale": rand(*shape).abs() / 40,
        "v_scale": rand(*shape, seed=1).abs() / 40,
    }


def in_pages(caches: dict[str, Tensor], page_size: int) -> tuple[dict[str, Tensor], Tensor]:
    batch = caches["k_cache"].shape[0]
    count = CAPACITY // page_size
    order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(0))
    table = order.view(batch, count)
    paged = {}
    for name, x in caches.items():
        paged[name] = x.new_empty((batch * count, page_size, *x.shape[2:]))
        paged[name][table] = x.unflatten(1, (count, page_size))
    return paged, table.int()


@pytest.mark.parametrize("name", CASES)
def test_each_sequence_is_attended_on_its_own(name: str, backend: str) -> None:
    case = CASES[name]
    options = case.options or {}
    dtype = torch.float64 if backend == "reference" else torch.float32
    caches = held(case, dtype)
    given: dict[str, Any] = {x: cache.clone() for x, cache in caches.items()}
    if case.page_size:
        given, given["block_table"] = in_pages(caches, case.page_size)
    cu_q = offsets(case.queries)
    q = rand(int(cu_q[-1]) + case.after, HQ, D).to(dtype)
    sinks = rand(HQ)
    new: dict[str, Any] = {}
    if case.new is not None:
        cu_new = offsets(case.new)
        rows = int(cu_new[-1]) + case.after
        new = {"k": rand(rows, HKV, D, seed=2), "v": rand(rows, HKV, DV, seed=3)}
        new = {x: tokens.to(dtype) for x, tokens in new.items()} | {"cu_seqlens_k_new": cu_new}
    out, lse = attention_with_kvcache(
        q, **given, **new, cache_seqlens=ints(*case.lengths), cu_seqlens_q=cu_q,
        max_seqlen_q=max(case.queries) + 2, sinks=sinks, return_lse=True, backend=backend,
        **options,
    )  # fmt: skip
    assert out.shape == (q.shape[0], HQ, DV)
    assert lse.shape == (HQ, q.shape[0])
    for b, length in enumerate(case.lengths):
        rows_q = slice(*cu_q[b : b + 2].tolist())
        mine: dict[str, Any] = {x: cache[b : b + 1] for x, cache in caches.items()}
        if case.new is not None:
            rows_new = slice(*cu_new[b : b + 2].tolist())
            mine |= {x: new[x][rows_new][None] for x in ("k", "v")}
        expected = attention_with_kvcache(
            q[rows_q][None], **mine, cache_seqlens=length, sinks=sinks, return_lse=True,
            backend="reference", **options,
        )  # fmt: skip
        found = out[rows_q][None], lse[:, rows_q][None]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not out[cu_q[-1] :].any()
    assert (lse[:, cu_q[-1] :] == -torch.inf).all()
    # The calls above wrote the contiguous caches, row by row.
    for x, cache in caches.items():
        written = given[x]
        if case.page_size:
            written = written[given["block_table"].long()].flatten(1, 2)
        assert torch.equal(written, cache), x


def arguments() -> dict[str, Any]:
    return {
        "q": rand(4, HQ, D),
        "k_cache": rand(2, 16, HKV, D),
        "v_cache": rand(2, 16, HKV, DV),
        "k": rand(3, HKV, D),
        "v": rand(3, HKV, DV),
        "cache_seqlens": ints(4, 13),
        "cu_seqlens_q": ints(0, 3, 4),
        "max_seqlen_q": 3,
        "cu_seqlens_k_new": ints(0, 1, 3),
    }


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a batch": ({"q": rand(2, 2, HQ, D)}, ValueError, r"q must be \(total_q, heads, head_dim\)"),
    "no bound": ({"max_seqlen_q": None}, ValueError, "max_seqlen_q must be given with"),
    "a bound too low": ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q must be .* 3, got 2"),
    "no number": ({"max_seqlen_q": "3"}, TypeError, "max_seqlen_q must be an int"),
    "offsets' dtype": ({"cu_seqlens_q": torch.tensor([0, 3, 4])}, TypeError, "cu_.* int32"),
    "offsets' end": ({"cu_seqlens_q": ints(0, 3, 5)}, ValueError, "within q's 4 tokens, got 5"),
    "offsets that fall": ({"cu_seqlens_q": ints(0, 3, 2)}, ValueError, "cu_seqlens_q must not"),
    "sequences": ({"cu_seqlens_q": ints(0, 4), "max_seqlen_q": 4}, ValueError, "cu_seqlens_k_new"),
    "new tokens in a batch": ({"k": rand(2, 1, HKV, D)}, ValueError, r"k must be \(total_new"),
    "new tokens' number": ({"v": rand(4, HKV, DV)}, ValueError, "v must have k's 3 new tokens"),
    "nothing new": ({"k": None, "v": None}, ValueError, "cu_seqlens_k_new must be None where"),
    "new tokens' end": ({"cu_seqlens_k_new": ints(0, 1, 9)}, ValueError, "within k's 3 tokens"),
    "heads": ({"k": rand(3, 1, D), "v": rand(3, 1, DV)}, ValueError, "k must have k_cache's heads"),
    "a full cache": ({"cache_seqlens": ints(4, 15)}, ValueError, "the cache is full: sequence 1"),
    "a length": ({"cache_seqlens": ints(4, -1)}, ValueError, "cache_seqlens must be 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_raises_and_changes_nothing(name: str) -> None:
    changes, error, said = BAD[name]
    given = {**arguments(), **changes}
    before = given["k_cache"].clone(), given["v_cache"].clone()
    with pytest.raises(error, match=said):
        attention_with_kvcache(**given)
    assert torch.equal(given["k_cache"], before[0])
    assert torch.equal(given["v_cache"], before[1])


def test_a_backend_that_cannot_serve_it_writes_nothing(native: str) -> None:
    given = {x: y.double() if x in ("q", "k", "v") else y for x, y in arguments().items()}
    given |= {x: given[x].double() for x in ("k_cache", "v_cache")}
    before = given["k_cache"].clone()
    with pytest.raises(RuntimeError, match="cannot serve this call"):
        attention_with_kvcache(**given, backend=native)
    assert torch.equal(given["k_cache"], before)


def test_explain_computes_nothing(native: str) -> None:
    given = arguments()
    before = given["k_cache"].clone()
    assert explain(attention_with_kvcache, **given).backend == native
    assert torch.equal(given["k_cache"], before)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_one_graph(backend: str) -> None:
    """Offsets are not read while a call is compiled: rows after the last sequence are there."""
    mine, theirs = arguments(), arguments()
    for given in (mine, theirs):
        given["q"], given["k"], given["v"] = rand(6, HQ, D), rand(5, HKV, D), rand(5, HKV, DV)

    def call(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = attention_with_kvcache(
            **given, return_lse=True, backend=backend
        )
        return found

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mine), call(theirs))
    for name in ("k_cache", "v_cache"):
        assert torch.equal(mine[name], theirs[name])
