"""The drop-ins for FlashAttention 3: its signatures and results, and what it has beside 2."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import explain
from resformer_kernels.compat import flash_attn, flash_attn_3
from resformer_kernels.compat.flash_attn_3 import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from tests.compat.documented import ADDED, close, documented, offsets, rand

SIGNATURES = {
    "flash_attn_func": (
        "q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
        "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_qkvpacked_func": (
        "qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, "
        "num_heads_q=None, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
        "seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, "
        "k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
        "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        "q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
        "return_softmax_lse=False"
    ),
}
HQ, HKV, D, DV = 4, 2, 8, 6


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = list(inspect.signature(getattr(flash_attn_3, name)).parameters.values())
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert ", ".join(shown) == SIGNATURES[name]
    added = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert added == ADDED
    assert set(flash_attn_3.__all__) == set(SIGNATURES)


@pytest.mark.parametrize("window", [(-1, -1), (2, 0), (1, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_meaning(causal: bool, window: tuple[int, int]) -> None:
    q, k, v = rand(2, 5, HQ, D), rand(2, 7, HKV, D), rand(2, 7, HKV, DV)
    first = v.cos()
    options: dict[str, Any] = {"softmax_scale": 0.4, "causal": causal, "window_size": window}
    options["softcap"] = 3.0
    out, lse = flash_attn_func(
        q, k, v, **options, v_first=first, lambda_v=0.3, lambda_first=-2, return_attn_probs=True
    )
    for b in range(2):
        expected_out, expected_lse = documented(q[b], k[b], 0.3 * v[b] - 2 * first[b], **options)
        close(out[b], expected_out)
        close(lse[b], expected_lse)
    plain = flash_attn_func(q, k, v, 0.4, causal, window_size=window, softcap=3.0)
    close(plain, flash_attn.flash_attn_func(q, k, v, **options))


def test_hints_change_nothing() -> None:
    q = rand(1, 5, 2, D)
    hints: dict[str, Any] = {"num_splits": 3, "pack_gqa": True, "sm_margin": 8}
    assert torch.equal(flash_attn_func(q, q, q, **hints), flash_attn_func(q, q, q))
    hints["scheduler_metadata"] = torch.zeros(4, dtype=torch.int32)
    found, expected = (flash_attn_with_kvcache(q, q, q, **some) for some in (hints, {}))
    torch.testing.assert_close(found, expected)


def test_stacked_tensors_are_the_separate_ones(backend: str) -> None:
    options: dict[str, Any] = {"causal": True, "window_size": (3, 0), "backend": backend}
    heads = rand(2, 6, HQ + 2 * HKV, D).float().requires_grad_()
    first = rand(2, 6, HKV, D).float()
    q, k, v = heads.split([HQ, HKV, HKV], dim=2)
    out = flash_attn_qkvpacked_func(heads, **options, num_heads_q=HQ, v_first=first)
    expected = flash_attn_func(q, k, v, **options, v_first=first)
    for one, other in zip(
        (out, *torch.autograd.grad(out.square().sum(), heads)),
        (expected, *torch.autograd.grad(expected.square().sum(), heads)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    stacked = rand(2, 6, 3, HQ, D).float()
    found = flash_attn_qkvpacked_func(stacked, **options, return_attn_probs=True)
    q, k, v = stacked.unbind(2)
    alone = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert all(torch.equal(x, y) for x, y in zip(found, alone, strict=True))


@pytest.mark.parametrize("sides", ["q", "k", "qk"])
def test_what_a_sequence_does_not_use(sides: str, backend: str) -> None:
    """As the rows in use alone: outputs and the gradients of every argument."""
    cu_q, cu_k = offsets(4, 0, 6, 2), offsets(5, 3, 4, 6)
    used_q, used_k = ints(2, 0, 6, 1), ints(4, 0, 4, 1)
    dtype = torch.float64 if backend == "reference" else torch.float32
    leaves: dict[str, Any] = {
        "q": rand(14, HQ, D),
        "k": rand(20, HKV, D),
        "v": rand(20, HKV, DV),
        "v_first": rand(20, HKV, DV).sin(),
        "lambda_v": rand(20, HKV, 1),
        "lambda_first": rand(HKV, 1),
    }
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    options: dict[str, Any] = {"causal": True, "return_attn_probs": True, "backend": backend}
    used: dict[str, Any] = {}
    rows: dict[str, Tensor] = {}
    for side, cu, count in (("q", cu_q, used_q), ("k", cu_k, used_k)):
        if side in sides:
            used[f"seqused_{side}"] = count
        else:
            count = cu[1:] - cu[:-1]
        starts = zip(cu[:-1].tolist(), count.tolist(), strict=True)
        rows[side] = torch.cat([torch.arange(a, a + n) for a, n in starts])
        rows[f"cu_{side}"] = offsets(*count.tolist())
    out, lse = flash_attn_varlen_func(
        **leaves, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=6, max_seqlen_k=6,
        **used, **options,
    )  # fmt: skip
    alone = {
        name: x[rows["q" if name == "q" else "k"]] if name != "lambda_first" else x
        for name, x in leaves.items()
    }
    expected_out, expected_lse = flash_attn_varlen_func(
        **alone, cu_seqlens_q=rows["cu_q"], cu_seqlens_k=rows["cu_k"], max_seqlen_q=6,
        max_seqlen_k=6, **options,
    )  # fmt: skip
    torch.testing.assert_close(out[rows["q"]], expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, rows["q"]], expected_lse, rtol=1e-5, atol=1e-5)
    unused = torch.ones(14, dtype=torch.bool).index_fill(0, rows["q"], False)
    assert not out[unused].any()
    assert (lse[:, unused] == -torch.inf).all()
    found, expected = (
        torch.autograd.grad(x.square().sum(), list(leaves.values())) for x in (out, expected_out)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def cache() -> tuple[Tensor, Tensor]:
    return rand(3, 12, HKV, D), rand(3, 12, HKV, DV)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("rotates", [False, True])
def test_packed_queries_and_new_tokens(rotates: bool, mode: str, interleaved: bool) -> None:
    """As a call for each sequence, by FlashAttention 2's function."""
    counts, new, lengths = (3, 0, 2), (2, 1, 2), (4, 0, 9)
    cu_q, cu_new = offsets(*counts), offsets(*new)
    q, k, v = rand(5, HQ, D), rand(5, HKV, D).sin(), rand(5, HKV, DV)
    first = v.cos()
    k_cache, v_cache = cache()
    held = k_cache.clone(), v_cache.clone()
    options: dict[str, Any] = {"causal": mode == "causal", "rotary_interleaved": interleaved}
    start: dict[str, Any] = {}
    if rotates:
        angles = rand(12, 2)
        options |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    out, lse, *parts = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=ints(*lengths), cu_seqlens_q=cu_q,
        cu_seqlens_k_new=cu_new, max_seqlen_q=3, return_softmax_lse=True, v_first=first,
        lambda_v=0.4, lambda_first=rand(HKV, 1), **options, **start,
    )  # fmt: skip
    assert [x.numel() for x in parts] == [0, 0]
    for b, length in enumerate(lengths):
        rows, tokens = (slice(*cu[b : b + 2].tolist()) for cu in (cu_q, cu_new))
        mine_k, mine_v = (x[b : b + 1] for x in held)
        expected = flash_attn.flash_attn_with_kvcache(
            q[None, rows], mine_k, mine_v, k[None, tokens], v[None, tokens], cache_seqlens=length,
            return_softmax_lse=True, v_first=first[None, tokens], lambda_v=0.4,
            lambda_first=rand(HKV, 1), **options,
        )  # fmt: skip
        torch.testing.assert_close((out[None, rows], lse[None, :, rows]), expected)
    assert torch.equal(k_cache, held[0])
    torch.testing.assert_close(v_cache, held[1])


def test_rotary_seqlens_are_positions() -> None:
    k_cache, v_cache = cache()
    q, k, v = rand(3, 2, HQ, D), rand(3, 2, HKV, D), rand(3, 2, HKV, DV)
    angles = rand(12, 2)
    tables = (angles.cos(), angles.sin())
    lengths, start = ints(4, 0, 9), ints(1, 7, 3)
    options: dict[str, Any] = {"causal": True, "rotary_cos": tables[0], "rotary_sin": tables[1]}
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, rotary_seqlens=start, **options
    )
    # The same tables, each sequence's moved to where its positions begin.
    for b, (length, first) in enumerate(zip(lengths.tolist(), start.tolist(), strict=True)):
        moved = [table.roll(length - first, 0) for table in tables]
        held = [x[b : b + 1].clone() for x in cache()]
        expected = flash_attn_with_kvcache(
            q[b : b + 1], held[0], held[1], k[b : b + 1], v[b : b + 1], cache_seqlens=length,
            causal=True, rotary_cos=moved[0], rotary_sin=moved[1],
        )  # fmt: skip
        torch.testing.assert_close(out[b : b + 1], expected)


def test_pages_have_a_table_by_another_name() -> None:
    k_cache, v_cache = cache()
    q, lengths = rand(3, 2, HQ, D), ints(4, 1, 9)
    table = ints(5, 0, 3, 2, 4, 1, 8, 7, 6).view(3, 3)
    paged = [x.new_zeros((9, 4, *x.shape[2:])) for x in (k_cache, v_cache)]
    for pages, held in zip(paged, (k_cache, v_cache), strict=True):
        pages[table.long()] = held.unflatten(1, (3, 4))
    options: dict[str, Any] = {"cache_seqlens": lengths, "causal": True}
    expected = flash_attn_with_kvcache(q, k_cache, v_cache, **options)
    out = flash_attn_with_kvcache(q, paged[0], paged[1], page_table=table, **options)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="page_table must name pages 0 to 8"):
        flash_attn_with_kvcache(q, paged[0], paged[1], page_table=table + 9, **options)
    flash_attn_with_kvcache(q, k_cache, v_cache, max_seqlen_q=2, **options)  # for no offsets


def test_explain_understands_them(native: str) -> None:
    q, packed = rand(1, 4, 2, D).float(), rand(4, 2, D).float()
    cu = offsets(1, 3)
    lengths = (cu, cu, 3, 3, ints(1, 2), ints(1, 2))
    for function, arguments in (
        (flash_attn_func, (q, q, q)),
        (flash_attn_qkvpacked_func, (torch.stack([q, q, q], 2),)),
        (flash_attn_varlen_func, (packed, packed, packed, *lengths)),
        (flash_attn_with_kvcache, (q, q, q)),
    ):
        assert explain(function, *arguments).backend == native


x = torch.ones(2, 5, HQ, D)
ARGUMENTS: dict[Any, dict[str, Any]] = {
    flash_attn_func: {"q": x, "k": x, "v": x},
    flash_attn_qkvpacked_func: {"qkv": torch.stack([x, x, x], 2)},
    flash_attn_varlen_func: {
        **dict.fromkeys("qkv", x[0]), **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), offsets(5)),
        "max_seqlen_q": 5, "max_seqlen_k": 5,
    },
    flash_attn_with_kvcache: {"q": x, "k_cache": x, "v_cache": x},
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "qv": x, "q_descale": x, "k_descale": x, "v_descale": x, "attention_chunk": 4
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", ARGUMENTS)
def test_what_the_kernels_do_not_compute(function: Any, name: str) -> None:
    if name in inspect.signature(function).parameters:
        with pytest.raises(NotImplementedError, match=rf"{name} must be (None|0)"):
            function(**ARGUMENTS[function], **{name: REFUSED[name]})


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (flash_attn_func, {"attention_chunk": -1}, ValueError, "attention_chunk must be at least 0"),
    (flash_attn_func, {"deterministic": None}, TypeError, "deterministic must be True or False"),
    (flash_attn_qkvpacked_func, {"qkv": x}, TypeError, "num_heads_q must be an int, got None"),
    (flash_attn_qkvpacked_func, {"qkv": x, "num_heads_q": 3}, ValueError, "num_heads_q = 3, got"),
    (flash_attn_qkvpacked_func, {"qkv": x, "num_heads_q": 4}, ValueError, "num_heads_q = 4, got"),
    (flash_attn_qkvpacked_func, {"qkv": x[0]}, ValueError, "qkv must be"),
    (flash_attn_varlen_func, {"seqused_q": ints(6)}, ValueError, "seqused_q must lie between"),
    (flash_attn_varlen_func, {"seqused_k": ints(-1)}, ValueError, "seqused_k must lie between"),
    (flash_attn_varlen_func, {"seqused_k": ints(1, 2)}, ValueError, r"seqused_k must be \(1,\)"),
    (flash_attn_varlen_func, {"seqused_q": torch.ones(1)}, TypeError, "seqused_q must be int32"),
    (flash_attn_with_kvcache, {"page_table": x[0]}, ValueError, "page_table must be"),
    (flash_attn_with_kvcache, {"cu_seqlens_q": offsets(5)}, ValueError, "q must be"),
    (flash_attn_with_kvcache, {"return_softmax_lse": 1}, TypeError, "return_softmax_lse must be"),
]


@pytest.mark.parametrize(("function", "changes", "error", "said"), BAD)
def test_bad_input_is_named(
    function: Any, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        function(**{**ARGUMENTS[function], **changes})
