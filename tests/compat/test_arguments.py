"""What every drop-in takes for a number, and that its errors are its original's too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resformer_kernels.compat import flash_attn, flash_attn_3, scaled_dot_product_attention
from tests.compat.documented import offsets, rand

Function = Callable[..., Any]

x, rows, cu = rand(2, 5, 4, 8), rand(10, 4, 8), offsets(4, 6)
packed: dict[str, Any] = {
    "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 6, "max_seqlen_k": 6
}  # fmt: skip
separate: dict[str, Any] = dict.fromkeys("qkv", x)
cache: dict[str, Any] = {"q": x, "k_cache": x, "v_cache": x, "cache_seqlens": 3}

CALLS: dict[str, tuple[Function, dict[str, Any]]] = {
    "sdpa": (scaled_dot_product_attention, dict.fromkeys(("query", "key", "value"), x)),
    "2, separate": (flash_attn.flash_attn_func, separate),
    "2, kv": (flash_attn.flash_attn_kvpacked_func, {"q": x, "kv": torch.stack([x, x], 2)}),
    "2, qkv": (flash_attn.flash_attn_qkvpacked_func, {"qkv": torch.stack([x, x, x], 2)}),
    "2, packed": (flash_attn.flash_attn_varlen_func, {**dict.fromkeys("qkv", rows), **packed}),
    "2, packed kv": (
        flash_attn.flash_attn_varlen_kvpacked_func,
        {"q": rows, "kv": torch.stack([rows, rows], 1), **packed},
    ),
    "2, packed qkv": (
        flash_attn.flash_attn_varlen_qkvpacked_func,
        {"qkv": torch.stack([rows, rows, rows], 1), "cu_seqlens": cu, "max_seqlen": 6},
    ),
    "2, pages": (
        flash_attn.flash_attn_varlen_func,
        {"q": rows, "k": x, "v": x, **packed,
         "block_table": torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)},
    ),
    "2, cache": (flash_attn.flash_attn_with_kvcache, cache),
    "3, separate": (flash_attn_3.flash_attn_func, separate),
    "3, qkv": (
        flash_attn_3.flash_attn_qkvpacked_func,
        {"qkv": torch.cat([x, x[:, :, :2], x[:, :, :2]], 2), "num_heads_q": 4},
    ),
    "3, packed": (flash_attn_3.flash_attn_varlen_func, {**dict.fromkeys("qkv", rows), **packed}),
    "3, cache": (flash_attn_3.flash_attn_with_kvcache, cache),
    "3, packed cache": (
        flash_attn_3.flash_attn_with_kvcache,
        {**cache, "q": rows, "cu_seqlens_q": cu, "max_seqlen_q": 6},
    ),
}  # fmt: skip
"""A call of every drop-in."""

REALS: dict[str, float] = {
    "scale": 0.5, "softmax_scale": 0.5, "softcap": 2.0, "dropout_p": 0.0,
    "exclusive_eps": 0.5,
}  # fmt: skip
INTEGERS: dict[str, int] = {
    "max_seqlen": 6, "max_seqlen_q": 6, "max_seqlen_k": 6, "num_heads_q": 4, "num_splits": 2,
    "cache_seqlens": 3, "attention_chunk": 0,
}  # fmt: skip
# Each is 0.5, 2, ... whatever it holds.
REAL_FORMS: list[Callable[[float], Any]] = [
    np.float32, np.float64, np.array, torch.tensor, lambda n: torch.tensor(n).double()
]  # fmt: skip
INTEGER_FORMS: list[Callable[[int], Any]] = [np.int32, np.int64, np.array, torch.tensor]


def parameters(call: str) -> set[str]:
    return set(inspect.signature(CALLS[call][0]).parameters)


def result(call: str, **changes: Any) -> Tensor:
    function, arguments = CALLS[call]
    out: Tensor = function(**{**arguments, **changes})
    return out


@pytest.mark.parametrize("call", CALLS)
def test_numbers_of_every_kind(call: str) -> None:
    for name, value in REALS.items():
        for form in REAL_FORMS if name in parameters(call) else []:
            expected = result(call, **{name: value})
            assert torch.equal(result(call, **{name: form(value)}), expected), (name, form)
    for name, count in INTEGERS.items():
        for whole in INTEGER_FORMS if name in parameters(call) else []:
            if name in CALLS[call][1] or name in ("num_splits", "attention_chunk"):
                expected = result(call, **{name: count})
                assert torch.equal(result(call, **{name: whole(count)}), expected), (name, whole)


@pytest.mark.parametrize("call", CALLS)
def test_windows_of_every_kind(call: str) -> None:
    if call == "sdpa":
        return
    expected = result(call, window_size=(2, 1))
    assert not torch.equal(expected, result(call))
    pair = torch.tensor([2, 1])
    forms = (pair, pair.numpy(), pair.tolist(), tuple(pair), tuple(pair.int().numpy()))
    for window in forms:
        assert torch.equal(result(call, window_size=window), expected), window


@pytest.mark.parametrize("call", CALLS)
def test_a_truth_is_a_number_where_the_original_takes_one(call: str) -> None:
    for name, value in (("dropout_p", False), ("softcap", False), ("scale", True)):
        if name in parameters(call):
            number = result(call, **{name: float(value)})
            assert torch.equal(result(call, **{name: value}), number)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_number(call: str) -> None:
    for name in REALS.keys() & parameters(call):
        for value in ("1", [1.0], torch.ones(1), torch.ones((), requires_grad=True), 1j):
            with pytest.raises(TypeError, match=f"^{name} must be a number"):
                result(call, **{name: value})
    for window in ((1.5, 0), ("1", "2"), (1, 2, 3), 4, None, torch.ones(2)):
        if call != "sdpa":
            with pytest.raises(TypeError, match=r"^window_size must be"):
                result(call, window_size=window)


@pytest.mark.parametrize("call", CALLS)
def test_errors_are_the_originals_too(call: str) -> None:
    """PyTorch and FlashAttention raise RuntimeError for a wrong shape or dtype."""
    first = next(iter(CALLS[call][1]))
    tensor = CALLS[call][1][first]
    wrong: dict[type[Exception], Any] = {ValueError: tensor[0, 0, 0], TypeError: tensor.int()}
    for kind, value in wrong.items():
        for caught in (kind, RuntimeError):
            with pytest.raises(caught, match=f"^{first} must"):
                result(call, **{first: value})
    with pytest.raises(RuntimeError, match=r"must be True or False"):
        result(call, **{"is_causal" if call == "sdpa" else "causal": 2})


def test_an_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError) as caught:
        scaled_dot_product_attention(x, x, x[..., :-1, :])
    assert any(entry.name == "check_inputs" for entry in caught.traceback)
    assert caught.value.__suppress_context__
