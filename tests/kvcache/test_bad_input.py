"""Every bad argument: an error that names it and what it takes; the cache as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resformer_kernels import attention_with_kvcache, explain


def contiguous() -> dict[str, Any]:
    return {
        "q": torch.randn(2, 3, 4, 8),
        "k_cache": torch.randn(2, 16, 2, 8),
        "v_cache": torch.randn(2, 16, 2, 6),
        "k": torch.randn(2, 3, 2, 8),
        "v": torch.randn(2, 3, 2, 6),
        "cache_seqlens": torch.tensor([4, 13], dtype=torch.int32),
    }


def paged() -> dict[str, Any]:
    return {
        **contiguous(),
        "k_cache": torch.randn(9, 4, 2, 8),
        "v_cache": torch.randn(9, 4, 2, 6),
        "block_table": torch.tensor([[0, 1, -1, 99], [5, 3, 2, 8]], dtype=torch.int32),
    }


def quantised() -> dict[str, Any]:
    return {
        **contiguous(),
        "k_cache": torch.zeros(2, 16, 2, 8, dtype=torch.int8),
        "v_cache": torch.zeros(2, 16, 2, 6, dtype=torch.int8),
        "k_scale": torch.ones(2, 16, 2),
        "v_scale": torch.ones(2, 16, 2),
    }


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


meta = torch.device("meta")
expanded = torch.randn(1, 16, 2, 8).expand(2, -1, -1, -1)
below, above = ints([0, -1, 1, 1], [5, 3, 2, 8]), ints([0, 1, 1, 1], [5, 3, 2, 9])
narrow = ints([0, 1, 2], [5, 3, 2])

# (argument changed, its new value, error, words of the message)
CONTIGUOUS: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("q", "text", TypeError, ["q", "tensor", "text"]),
    ("q", torch.randn(3, 4, 8), ValueError, ["q", "(3, 4, 8)", "batch, time, heads, head_dim"]),
    ("q", torch.randn(3, 3, 4, 8), ValueError, ["k", "batch size 3", "(2, 3, 2, 8)"]),
    ("q", torch.randn(2, 3, 4, 7), ValueError, ["k_cache", "head_dim 7", "(2, 16, 2, 8)"]),
    ("q", torch.randn(2, 3, 3, 8), ValueError, ["q has 3", "k_cache has 2", "multiple"]),
    ("q", torch.ones(2, 3, 4, 8, dtype=torch.int64), TypeError, ["q", "float32", "int64"]),
    ("q", torch.randn(2, 3, 4, 8).half(), TypeError, ["k_cache", "float16", "float32", "int8"]),
    ("k_cache", None, TypeError, ["k_cache", "tensor", "None"]),
    ("k_cache", torch.randn(2, 16, 8), ValueError, ["k_cache", "capacity", "(2, 16, 8)"]),
    ("k_cache", torch.randn(2, 16, 2, 8, device=meta), ValueError, ["k_cache", "cpu", "meta"]),
    ("k_cache", torch.zeros(2, 16, 2, 8, dtype=torch.int16), TypeError, ["k_cache", "int16"]),
    ("k_cache", expanded, ValueError, ["k_cache", "expanded"]),
    ("v_cache", torch.randn(2, 15, 2, 6), ValueError, ["v_cache", "(2, 16, 2)", "(2, 15, 2, 6)"]),
    ("v_cache", torch.randn(2, 16, 2, 0), ValueError, ["v_cache", "at least 1", "(2, 16, 2, 0)"]),
    ("v_cache", torch.randn(2, 16, 2, 6).double(), TypeError, ["v_cache", "float32", "float64"]),
    ("k", torch.randn(2, 3, 2, 7), ValueError, ["k", "k_cache's", "(2, 8)", "(2, 3, 2, 7)"]),
    ("k", torch.randn(1, 3, 2, 8), ValueError, ["k", "batch size 2", "(1, 3, 2, 8)"]),
    ("k", torch.randn(2, 3, 2, 8).half(), TypeError, ["k", "float32", "float16"]),
    ("v", torch.randn(2, 2, 2, 6), ValueError, ["v", "3 new tokens", "(2, 2, 2, 6)"]),
    ("v", torch.randn(2, 3, 1, 6), ValueError, ["v", "v_cache's", "(2, 6)", "(2, 3, 1, 6)"]),
    ("v", 1.5, TypeError, ["v", "tensor", "1.5"]),
    ("cache_seqlens", None, TypeError, ["cache_seqlens", "int", "None"]),
    ("cache_seqlens", True, TypeError, ["cache_seqlens", "int", "True"]),
    ("cache_seqlens", 14, ValueError, ["full", "14 tokens", "3 are appended", "16"]),
    ("cache_seqlens", -1, ValueError, ["cache_seqlens", "0 or more", "-1"]),
    ("cache_seqlens", 2**40, ValueError, ["cache_seqlens", "32 bits"]),
    ("cache_seqlens", ints(4, 14), ValueError, ["full", "sequence 1", "14 tokens", "16"]),
    ("cache_seqlens", ints(4, -2), ValueError, ["cache_seqlens", "-2", "index 1"]),
    ("cache_seqlens", ints(4, 2).long(), TypeError, ["cache_seqlens", "int32", "int64"]),
    ("cache_seqlens", ints(4), ValueError, ["cache_seqlens", "batch size 2", "(1,)"]),
    ("cache_seqlens", ints([4, 5]), ValueError, ["cache_seqlens", "(batch,)", "(1, 2)"]),
    ("cache_seqlens", ints(4, 5).to(meta), ValueError, ["cache_seqlens", "cpu", "meta"]),
    ("block_table", ints(4, 5), ValueError, ["block_table", "(batch, max_pages)", "(2,)"]),
    ("key_mask", torch.ones(2, 16), TypeError, ["key_mask", "bool", "float32"]),
    ("key_mask", "no", TypeError, ["key_mask", "bool", "'no'"]),
    ("key_mask", torch.ones(2, 17).bool(), ValueError, ["key_mask", "16", "(2, 17)"]),
    ("key_mask", torch.ones(3, 16).bool(), ValueError, ["key_mask", "(2, T)", "(3, 16)"]),
    ("key_mask", torch.ones(2, 4, 1, 16).bool(), ValueError, ["key_mask", "(2, 4, 1, 16)"]),
    ("key_mask", torch.ones(2, 15).bool(), ValueError, ["key_mask", "sequence 1's 16", "15"]),
    ("key_mask", torch.ones(2, 16, device=meta).bool(), ValueError, ["key_mask", "cpu", "meta"]),
    ("causal", 1, TypeError, ["causal", "True or False"]),
    ("window", (-2, 0), ValueError, ["window", "(-2, 0)"]),
    ("scale", float("inf"), ValueError, ["scale", "finite", "inf"]),
    ("softcap", -1.0, ValueError, ["softcap", "-1.0"]),
    ("sinks", torch.randn(2), ValueError, ["sinks", "(4,)", "(2,)"]),
    ("k_scale", torch.ones(2, 16, 2), ValueError, ["k_scale", "int8", "float32", "None"]),
    ("exclusive", "all", TypeError, ["exclusive", "number or a tensor", "'all'"]),
    ("exclusive", torch.ones(4), ValueError, ["exclusive", "(2, 3, 4, 1)", "(4,)", "(4, 1)"]),
    ("exclusive", torch.ones(2, 1), ValueError, ["exclusive", "per query head", "(2, 1)"]),
    ("exclusive", torch.ones(2, 3, 4, 6), ValueError, ["exclusive", "(2, 3, 4, 1)"]),
    ("exclusive", torch.ones(4, 1).half(), TypeError, ["exclusive", "float32", "float16"]),
    ("exclusive", torch.ones(4, 1, device=meta), ValueError, ["exclusive", "cpu", "meta"]),
    ("exclusive_eps", 0.0, ValueError, ["exclusive_eps", "1e-18", "0.0"]),
    ("exclusive_eps", "small", TypeError, ["exclusive_eps", "'small'"]),
    ("out_gate", 0.5, TypeError, ["out_gate", "tensor or None", "0.5"]),
    ("out_gate", torch.ones(2, 3, 4, 8), ValueError, ["out_gate", "(2, 3, 4, 6)", "8)"]),
    ("out_gate", torch.ones(2, 3, 2, 1), ValueError, ["out_gate", "per query head", "of which"]),
    ("out_gate", torch.ones(4, 1).bfloat16(), TypeError, ["out_gate", "float32", "bfloat16"]),
    ("out_gate", torch.ones(4, 6, device=meta), ValueError, ["out_gate", "cpu", "meta"]),
    ("num_splits", -1, ValueError, ["num_splits", "-1"]),
    ("num_splits", 10**6, ValueError, ["num_splits", "1024"]),
    ("num_splits", 2.0, TypeError, ["num_splits", "int", "2.0"]),
    ("return_lse", None, TypeError, ["return_lse", "True or False"]),
    ("backend", "cuda", ValueError, ["backend", "'reference'", "'cuda'"]),
]  # fmt: skip
PAGED: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("k_cache", torch.randn(9, 4, 8), ValueError, ["k_cache", "page_size", "(9, 4, 8)"]),
    ("block_table", [[1]], TypeError, ["block_table", "int32", "[[1]]"]),
    ("block_table", ints([0, 1, 2, 3], [0, 1, 2, 3]).long(), TypeError, ["int32", "int64"]),
    ("block_table", ints([0, 1, 2, 3]), ValueError, ["block_table", "batch size 2", "(1, 4)"]),
    ("block_table", below, ValueError, ["0 to 8", "-1", "page 1 of sequence 0"]),
    ("block_table", above, ValueError, ["0 to 8", "9", "page 3 of sequence 1"]),
    ("block_table", narrow, ValueError, ["full", "sequence 1", "capacity is 12"]),
    ("cache_seqlens", ints(4, 14), ValueError, ["full", "sequence 1", "capacity is 16"]),
]  # fmt: skip
QUANTISED: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("k_scale", None, ValueError, ["k_scale", "(2, 16, 2)", "None"]),
    ("v_scale", torch.ones(2, 16), ValueError, ["v_scale", "(2, 16, 2)", "(2, 16)"]),
    ("v_scale", torch.ones(2, 16, 1), ValueError, ["v_scale", "(2, 16, 2)", "(2, 16, 1)"]),
    ("v_scale", torch.ones(2, 16, 2).half(), TypeError, ["v_scale", "float32", "float16"]),
    ("k_scale", torch.ones(2, 16, 2, device=meta), ValueError, ["k_scale", "cpu", "meta"]),
    ("v_cache", torch.zeros(2, 16, 2, 6), TypeError, ["v_cache", "int8", "float32"]),
    ("k", torch.zeros(2, 3, 2, 8, dtype=torch.int8), TypeError, ["k", "float32", "int8"]),
]
GROUPS = ((contiguous, CONTIGUOUS), (paged, PAGED), (quantised, QUANTISED))
CASES = [(make, case) for make, cases in GROUPS for case in cases]


IDS = [f"{make.__name__}-{case[0]}-{i}" for i, (make, case) in enumerate(CASES)]


@pytest.mark.parametrize(("make", "case"), CASES, ids=IDS)
def test_a_bad_argument_raises_and_changes_nothing(make: Any, case: Any) -> None:
    name, value, error, words = case
    arguments = {**make(), name: value}
    before = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error) as caught:
        attention_with_kvcache(**arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    for key, x in before.items():
        if x.device.type == "cpu":
            assert torch.equal(arguments[key], x)


@pytest.mark.parametrize("name", ["q", "k_cache", "v", "sinks", "exclusive", "out_gate"])
def test_a_gradient_is_refused(name: str) -> None:
    factors = {"exclusive": torch.randn(4, 1), "out_gate": torch.randn(4, 1)}
    arguments = {**contiguous(), **factors, "sinks": torch.randn(4)}
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} requires one"):
        attention_with_kvcache(**arguments)
    with torch.no_grad():
        attention_with_kvcache(**arguments)


def test_vmap_is_refused() -> None:
    arguments = contiguous()
    mapped = torch.randn(5, 2, 3, 4, 8)

    def attend(q: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attention_with_kvcache(**{**arguments, "q": q})
        return out

    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(attend)(mapped)


def test_a_bound_of_the_backend_is_named() -> None:
    arguments = contiguous()
    wide = torch.randn(2, 16, 2, 16)[..., ::2]
    found = explain(attention_with_kvcache, **{**arguments, "k_cache": wide})
    assert found.backend == "reference"
    assert "stride 2" in found.reasons["native"]
    halves = {key: x.double() if x.is_floating_point() else x for key, x in arguments.items()}
    assert "float64" in explain(attention_with_kvcache, **halves).reasons["native"]
