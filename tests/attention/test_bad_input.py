"""Every bad argument: an error that names it, what it got and what it takes; inputs untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resformer_kernels import value_residual_attention, value_residual_attention_varlen

Change = Callable[[dict[str, Any]], Any]


def fixed() -> dict[str, Any]:
    return {
        "q": torch.randn(2, 5, 4, 8),
        "k": torch.randn(2, 6, 2, 8),
        "v": torch.randn(2, 6, 2, 3),
        "v_first": torch.randn(2, 6, 2, 3),
    }


def packed() -> dict[str, Any]:
    return {
        "q": torch.randn(10, 4, 8),
        "k": torch.randn(12, 2, 8),
        "v": torch.randn(12, 2, 3),
        "v_first": torch.randn(12, 2, 3),
        "cu_seqlens_q": torch.tensor([0, 5, 10], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 6, 12], dtype=torch.int32),
        "max_seqlen_q": 5,
        "max_seqlen_k": 6,
    }


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# (argument changed, its new value, error, words of the message)
FIXED: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("q", "text", TypeError, ["q", "tensor", "text"]),
    ("q", None, TypeError, ["q", "tensor", "None"]),
    ("q", torch.randn(5, 4, 8), ValueError, ["q", "(5, 4, 8)", "batch, time, heads, head_dim"]),
    ("q", torch.randn(3, 5, 4, 8), ValueError, ["batch size 3", "(2, 6, 2, 8)"]),
    ("q", torch.randn(2, 5, 4, 7), ValueError, ["head_dim 7", "(2, 6, 2, 8)"]),
    ("q", torch.randn(2, 5, 4, 0), ValueError, ["head_dim 0"]),
    ("q", torch.randn(2, 5, 3, 8), ValueError, ["q has 3", "k has 2", "multiple"]),
    ("q", torch.randn(2, 5, 0, 8), ValueError, ["q has 0"]),
    ("q", torch.randint(9, (2, 5, 4, 8)), TypeError, ["q", "float32", "int64"]),
    ("q", torch.randn(2, 5, 4, 8, dtype=torch.complex64), TypeError, ["q", "complex64"]),
    ("q", torch.randn(2, 5, 4, 8).to_sparse(), TypeError, ["q", "dense", "sparse"]),
    ("k", torch.randn(2, 6, 8), ValueError, ["k", "kv_heads", "(2, 6, 8)"]),
    ("k", torch.randn(2, 6, 2, 8).half(), TypeError, ["k", "float32", "float16"]),
    ("k", torch.randn(2, 6, 2, 8, device="meta"), ValueError, ["k", "cpu", "meta"]),
    ("exclusive", "all", TypeError, ["exclusive", "number", "all"]),
    ("exclusive", torch.randn(4), ValueError, ["exclusive", "per query head", "(4, 1)"]),
    ("exclusive", torch.randn(2, 5, 2, 1), ValueError, ["2 KV heads", "there are 4"]),
    ("exclusive", torch.randn(2, 5, 4, 3), ValueError, ["exclusive", "(2, 5, 4, 1)"]),
    ("exclusive", torch.randn(4, 1).half(), TypeError, ["exclusive", "float16", "q's dtype"]),
    ("exclusive", torch.randn(4, 1, device="meta"), ValueError, ["exclusive", "cpu", "meta"]),
    ("exclusive_eps", 0.0, ValueError, ["exclusive_eps", "1e-18", "0.0"]),
    ("exclusive_eps", float("nan"), ValueError, ["exclusive_eps", "nan"]),
    ("exclusive_eps", "small", TypeError, ["exclusive_eps", "number"]),
    ("out_gate", 1.0, TypeError, ["out_gate", "tensor or None", "1.0"]),
    ("out_gate", torch.randn(2, 5, 4, 8), ValueError, ["out_gate", "(2, 5, 4, 3)"]),
    ("out_gate", torch.randn(3, 2, 5, 4, 3), ValueError, ["out_gate", "enlarging"]),
    ("out_gate", torch.randn(4, 1).to_sparse(), TypeError, ["out_gate", "dense"]),
    ("v", torch.randn(2, 7, 2, 3), ValueError, ["v", "(2, 6, 2)", "(2, 7, 2, 3)"]),
    ("v", torch.randn(2, 6, 1, 3), ValueError, ["v", "(2, 6, 2)", "(2, 6, 1, 3)"]),
    ("v", torch.randn(2, 6, 2, 0), ValueError, ["v", "(2, 6, 2, 0)", "at least 1"]),
    ("v", torch.randn(2, 6, 2, 3).double(), TypeError, ["v", "float32", "float64"]),
    ("v", 3.0, TypeError, ["v", "tensor", "3.0"]),
    ("v_first", torch.randn(2, 6, 2, 4), ValueError, ["v_first", "(2, 6, 2, 3)", "(2, 6, 2, 4)"]),
    ("v_first", torch.randn(2, 6, 2, 3, device="meta"), ValueError, ["v_first", "cpu", "meta"]),
    ("lambda_v", torch.randn(2), ValueError, ["lambda_v", "(2,)", "(2, 1)", "per KV head"]),
    ("lambda_v", torch.randn(4, 1), ValueError, ["lambda_v", "(4, 1)", "query heads", "KV head"]),
    ("lambda_v", torch.randn(4), ValueError, ["lambda_v", "(4,)", "(2, 1)"]),
    ("lambda_v", torch.randn(5, 6, 2, 3), ValueError, ["lambda_v", "(5, 6, 2, 3)", "enlarging"]),
    ("lambda_v", torch.randn(1, 2, 6, 2, 3), ValueError, ["lambda_v", "(1, 2, 6, 2, 3)"]),
    ("lambda_v", torch.randn(2, 1).half(), TypeError, ["lambda_v", "float32", "float16"]),
    ("lambda_v", torch.ones(2, 1, dtype=torch.int64), TypeError, ["lambda_v", "int64"]),
    ("lambda_v", "0.5", TypeError, ["lambda_v", "number", "'0.5'"]),
    ("lambda_v", True, TypeError, ["lambda_v", "number", "True"]),
    ("lambda_v", None, TypeError, ["lambda_v", "number", "None"]),
    ("lambda_first", torch.randn(2, 1, device="meta"), ValueError, ["lambda_first", "cpu", "meta"]),
    ("lambda_first", torch.randn(2, 6, 4, 1), ValueError, ["lambda_first", "query heads"]),
    ("causal", 1, TypeError, ["causal", "True or False", "1"]),
    ("window", (-2, 0), ValueError, ["window", "(-2, 0)", "-1"]),
    ("window", (0, -7), ValueError, ["window", "(0, -7)"]),
    ("window", 5, TypeError, ["window", "pair", "5"]),
    ("window", (1, 2, 3), TypeError, ["window", "pair", "(1, 2, 3)"]),
    ("window", (1.5, 2), TypeError, ["window", "int", "1.5"]),
    ("scale", float("nan"), ValueError, ["scale", "finite", "nan"]),
    ("scale", float("inf"), ValueError, ["scale", "finite", "inf"]),
    ("scale", "big", TypeError, ["scale", "number", "'big'"]),
    ("softcap", -1.0, ValueError, ["softcap", "positive", "-1.0"]),
    ("softcap", float("nan"), ValueError, ["softcap", "nan"]),
    ("softcap", None, TypeError, ["softcap", "number", "None"]),
    ("sinks", torch.randn(2), ValueError, ["sinks", "(4,)", "(2,)"]),
    ("sinks", torch.randn(4, 1), ValueError, ["sinks", "(4,)", "(4, 1)"]),
    ("sinks", torch.randn(4).half(), TypeError, ["sinks", "float32", "float16"]),
    ("sinks", 0.5, TypeError, ["sinks", "tensor", "0.5"]),
    ("sinks", torch.randn(4, device="meta"), ValueError, ["sinks", "cpu", "meta"]),
    ("attn_bias", torch.randn(3, 1, 5, 6), ValueError, ["attn_bias", "(2, 4, 5, 6)", "(3, 1, 5"]),
    ("attn_bias", torch.randn(1, 2, 4, 5, 6), ValueError, ["attn_bias", "(1, 2, 4, 5, 6)"]),
    ("attn_bias", torch.randn(5, 6).half(), TypeError, ["attn_bias", "bool", "float16"]),
    ("attn_bias", torch.ones(5, 6, dtype=torch.uint8), TypeError, ["attn_bias", "uint8"]),
    ("attn_bias", torch.randn(5, 6, device="meta"), ValueError, ["attn_bias", "cpu", "meta"]),
    ("attn_bias", [[0.0]], TypeError, ["attn_bias", "tensor", "list"]),
    ("return_lse", 1, TypeError, ["return_lse", "True or False"]),
    ("return_mixed_value", "yes", TypeError, ["return_mixed_value", "True or False", "yes"]),
    ("backend", "cuda", ValueError, ["backend", "'auto'", "'native'", "'reference'", "'cuda'"]),
]

PACKED: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("q", torch.randn(1, 10, 4, 8), ValueError, ["q", "total_tokens", "(1, 10, 4, 8)"]),
    ("cu_seqlens_q", None, TypeError, ["cu_seqlens_q", "None"]),
    ("cu_seqlens_q", [0, 5, 10], TypeError, ["cu_seqlens_q", "tensor", "[0, 5, 10]"]),
    ("cu_seqlens_q", torch.tensor([0, 5, 10]), TypeError, ["cu_seqlens_q", "int32", "int64"]),
    ("cu_seqlens_q", offsets(0, 5), ValueError, ["cu_seqlens_k", "2 entries", "3"]),
    ("cu_seqlens_q", offsets(1, 5, 10), ValueError, ["cu_seqlens_q", "start at 0", "1"]),
    ("cu_seqlens_q", offsets(0, 7, 5), ValueError, ["cu_seqlens_q", "decrease", "5 after 7"]),
    ("cu_seqlens_q", offsets(0, 5, 11), ValueError, ["cu_seqlens_q", "10", "11"]),
    ("cu_seqlens_q", offsets(0, -5, 10), ValueError, ["cu_seqlens_q", "decrease", "-5"]),
    ("cu_seqlens_q", offsets(), ValueError, ["cu_seqlens_q", "batch + 1"]),
    ("cu_seqlens_q", offsets(0, 5, 10)[None], ValueError, ["cu_seqlens_q", "(batch + 1,)"]),
    ("cu_seqlens_k", offsets(0, 6, 2**31 - 1), ValueError, ["cu_seqlens_k", "12", "2147483647"]),
    ("cu_seqlens_k", offsets(0, 6, 12).to("meta"), ValueError, ["cu_seqlens_k", "cpu", "meta"]),
    ("max_seqlen_q", 4, ValueError, ["max_seqlen_q", "5", "4"]),
    ("max_seqlen_k", -1, ValueError, ["max_seqlen_k", "at least 0", "-1"]),
    ("max_seqlen_k", 6.0, TypeError, ["max_seqlen_k", "int", "6.0"]),
    ("max_seqlen_k", None, TypeError, ["max_seqlen_k", "int", "None"]),
    ("lambda_v", torch.randn(2, 6, 2, 3), ValueError, ["lambda_v", "(12, 2, 3)", "(2, 6, 2, 3)"]),
    ("attn_bias", torch.randn(5, 7), ValueError, ["attn_bias", "(2, 4, 5, 6)", "(5, 7)"]),
]


def check(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    error: type[Exception],
    words: list[str],
) -> None:
    tensors = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    before = {
        n: x.clone() for n, x in tensors.items() if x.device.type == "cpu" and not x.is_sparse
    }
    with pytest.raises(error) as caught:
        function(**arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing: {caught.value}"
    assert all(torch.equal(before[n], tensors[n]) for n in before)


@pytest.mark.parametrize(("name", "value", "error", "words"), FIXED)
def test_fixed_length(name: str, value: Any, error: type[Exception], words: list[str]) -> None:
    check(value_residual_attention, {**fixed(), name: value}, error, words)


@pytest.mark.parametrize(("name", "value", "error", "words"), PACKED)
def test_packed(name: str, value: Any, error: type[Exception], words: list[str]) -> None:
    check(value_residual_attention_varlen, {**packed(), name: value}, error, words)


def test_no_values() -> None:
    arguments = {**fixed(), "v": None, "v_first": None}
    check(value_residual_attention, arguments, ValueError, ["v and v_first are both None"])


@pytest.mark.parametrize("absent", ["v", "v_first"])
@pytest.mark.parametrize("name", ["lambda_v", "lambda_first"])
def test_tensor_coefficient_without_both_sources(absent: str, name: str) -> None:
    arguments = {**fixed(), absent: None, name: torch.ones(2, 1)}
    check(value_residual_attention, arguments, ValueError, [name, f"{absent} is None", "(2, 1)"])


def test_named_backend_never_falls_back(native: str) -> None:
    arguments = {n: x.double() for n, x in fixed().items()}
    with pytest.raises(RuntimeError, match=r"backend='native' cannot serve.*float64"):
        value_residual_attention(**arguments, backend=native)


def test_the_op_trusts_nothing(native: str) -> None:
    """What Python could not read under a compiler, C++ checks before it touches memory."""
    del native
    arguments = packed()
    for wrong in ((0, 5, 11), (1, 5, 10), (0, 7, 5), (0, -5, 10)):
        with pytest.raises(RuntimeError, match="cu_seqlens_q"):
            torch.ops.resformer.value_residual_attention_forward(
                arguments["q"], arguments["k"], arguments["v"], None, None, None, 1.0, 1.0,
                offsets(*wrong), arguments["cu_seqlens_k"], 5, 6, -1, -1, 1.0, 0.0,
                None, None, True, False,
            )  # fmt: skip
