"""The drop-in for PyTorch's scaled_dot_product_attention, against PyTorch's in float64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from resformer_kernels import explain, value_residual_attention
from resformer_kernels._core.select import prepare
from resformer_kernels.compat import scaled_dot_product_attention as sdpa
from tests.compat.documented import ADDED

Shape = tuple[int, ...]


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def inputs(q: Shape, k: Shape, v: Shape | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """query, key and value, a list."""
    v = v or k
    return [
        rand(*shape, dtype=dtype).add(i / 8).requires_grad_() for i, shape in enumerate((q, k, v))
    ]


def assert_same_as_torch(wrt: Any, tolerance: float = 1e-10, **options: Any) -> None:
    """Outputs and gradients, by the backend that `auto` takes."""
    expected = functional.scaled_dot_product_attention(*wrt, **options)
    found = sdpa(*wrt, **options)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    grad = rand(*expected.shape, dtype=expected.dtype)
    ours, theirs = ((out, *torch.autograd.grad(out, wrt, grad)) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_signature_is_that_of_pytorch() -> None:
    parameters = list(inspect.signature(sdpa).parameters.values())
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names == [
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    ]
    assert [p.default for p in parameters[3:8]] == [None, 0.0, False, None, False]
    added = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert added == ADDED


SHAPES: dict[str, tuple[Shape, Shape, Shape | None]] = {
    "four axes": ((2, 3, 7, 8), (2, 3, 7, 8), None),
    "wide values": ((2, 3, 7, 8), (2, 3, 7, 8), (2, 3, 7, 5)),
    "more keys": ((2, 3, 4, 8), (2, 3, 9, 8), None),
    "more queries": ((2, 3, 9, 8), (2, 3, 4, 8), None),
    "one query": ((2, 3, 1, 8), (2, 3, 9, 8), None),
    "one key": ((2, 3, 5, 8), (2, 3, 1, 8), None),
    "three axes": ((3, 7, 8), (3, 7, 8), None),
    "two axes": ((7, 8), (9, 8), (9, 6)),
    "five axes": ((2, 2, 3, 7, 8), (2, 2, 3, 7, 8), None),
    "leading axes broadcast": ((2, 1, 3, 4, 8), (1, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
    "one KV head": ((2, 4, 7, 8), (2, 1, 7, 8), None),
    "one query head": ((2, 1, 7, 8), (2, 4, 7, 8), None),
    "one key head, many value heads": ((2, 4, 7, 8), (2, 1, 7, 8), (2, 4, 7, 8)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, causal: bool) -> None:
    assert_same_as_torch(inputs(*SHAPES[name]), is_causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_native_serves_it(native: str, causal: bool) -> None:
    wrt = inputs((2, 4, 33, 16), (2, 4, 40, 16), dtype=torch.float32)
    assert explain(sdpa, *wrt, is_causal=causal).backend == native
    assert_same_as_torch(wrt, 1e-4, is_causal=causal)


def test_scale_and_grouped_heads() -> None:
    assert_same_as_torch(inputs((2, 6, 7, 8), (2, 2, 7, 8)), enable_gqa=True, scale=-0.3)
    assert_same_as_torch(inputs((6, 7, 8), (2, 7, 8)), enable_gqa=True)


@pytest.mark.parametrize(
    ("q", "mask"),
    [
        ((2, 3, 5, 8), (5, 7)),
        ((2, 3, 5, 8), (2, 1, 1, 7)),
        ((2, 3, 5, 8), (3, 5, 7)),
        ((3, 5, 8), (3, 1, 7)),
        ((5, 8), (5, 7)),
        ((2, 2, 3, 5, 8), (2, 1, 1, 5, 7)),
        ((2, 2, 3, 5, 8), (1, 1, 3, 5, 7)),
    ],
)
def test_masks(q: Shape, mask: Shape) -> None:
    k = (*q[:-2], 7, 8)
    assert_same_as_torch(inputs(q, k), attn_mask=rand(*mask))
    # Every query attends to a key: older versions of PyTorch give NaN for one without keys.
    assert_same_as_torch(
        inputs(q, k), attn_mask=(rand(*mask) > -0.3).index_fill(-1, torch.tensor([0]), True)
    )


def test_a_query_without_keys_gives_zeros(backend: str) -> None:
    q, k, v = inputs((1, 2, 4, 8), (1, 2, 4, 8), dtype=torch.float32)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    out = sdpa(q, k, v, attn_mask=mask, backend=backend)
    assert not out[:, :, 2].any()
    (dq,) = torch.autograd.grad(out.square().sum(), q)
    assert not dq[:, :, 2].any()
    assert dq.isfinite().all()


COEFFICIENTS: list[Shape] = [
    *((), (8,), (7, 1), (3, 1, 1), (3, 1, 8), (1, 7, 1), (2, 1, 7, 1), (2, 3, 7, 1), (2, 3, 7, 8))
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", COEFFICIENTS)
def test_coefficients_broadcast_in_this_layout(shape: Shape, causal: bool) -> None:
    q, k, v = inputs((2, 3, 4, 8), (2, 3, 7, 8))
    first, own = rand(2, 3, 7, 8).requires_grad_(), rand(*shape).requires_grad_()
    wrt = [q, k, v, first, own]

    def grads(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out.square().sum(), wrt)]

    found = grads(sdpa(q, k, v, is_causal=causal, v_first=first, lambda_v=own, lambda_first=-0.7))
    mixed = own * v - 0.7 * first
    expected = grads(functional.scaled_dot_product_attention(q, k, mixed, is_causal=causal))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_coefficients_with_other_ranks() -> None:
    q, k, v = inputs((2, 2, 3, 7, 8), (2, 2, 3, 7, 8))
    for shape in ((2, 1, 3, 1, 1), (3, 1, 1), (2, 3, 7, 8)):
        lam = rand(*shape)
        expected = functional.scaled_dot_product_attention(q, k, lam * v + 2 * k)
        found = sdpa(q, k, v, v_first=k, lambda_v=lam, lambda_first=2)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    q, k, v = (x[0, 0, 0] for x in (q, k, v))
    lam = rand(7, 1)
    expected = functional.scaled_dot_product_attention(q, k, lam * v + 2 * k)
    torch.testing.assert_close(sdpa(q, k, v, v_first=k, lambda_v=lam, lambda_first=2), expected)


def test_values_of_the_first_layer_alone() -> None:
    q, k, v = inputs((2, 3, 7, 8), (2, 3, 7, 8))
    expected = functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sdpa(q, k, None, v_first=v), expected, rtol=1e-10, atol=1e-10)


def test_nothing_is_copied() -> None:
    x = rand(2, 7, 3, 4, 8, dtype=torch.float32).permute(2, 0, 3, 1, 4)  # a qkv projection's views
    q, k, v = x.unbind(0)
    request = prepare(sdpa, q, k, v, v_first=v, is_causal=True)
    for name, tensor in (("q", q), ("k", k), ("v", v), ("v_first", v)):
        given = getattr(request.call, name)
        assert given.data_ptr() == tensor.data_ptr()
        assert given.stride() == tensor.transpose(1, 2).stride()
    assert not explain(sdpa, q, k, v, v_first=v).notes
    out = sdpa(q, k, v, v_first=v)
    assert out.transpose(1, 2).is_contiguous()
    expected = value_residual_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), v.transpose(1, 2)
    )
    assert torch.equal(out.transpose(1, 2), expected)


def test_autocast() -> None:
    q, k, v = inputs((2, 3, 7, 8), (2, 3, 7, 8), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sdpa(q, k.bfloat16(), v, attn_mask=torch.zeros(7, 7, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dropout": ({"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0, got 0.1"),
    "no probability": ({"dropout_p": 1.5}, ValueError, "dropout_p must be a probability"),
    "mask and causal": (
        {"attn_mask": torch.ones(7, 7), "is_causal": True},
        ValueError,
        "attn_mask must be None with is_causal=True",
    ),
    "mask's shape": ({"attn_mask": torch.ones(6, 7)}, ValueError, r"attn_mask must broadcast .*6"),
    "mask that enlarges": ({"attn_mask": torch.ones(5, 2, 3, 7, 7)}, ValueError, "attn_mask must"),
    "mask's dtype": ({"attn_mask": torch.ones(7, 7).int()}, TypeError, "attn_mask must be bool"),
    "mask's type": ({"attn_mask": [1.0]}, TypeError, "attn_mask must be a tensor or None"),
    "flag": ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
    "gqa flag": ({"enable_gqa": None}, TypeError, "enable_gqa must be True or False"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be"),
    "query's type": ({"query": 3}, TypeError, "query must be a tensor"),
    "query's dtype": ({"query": torch.ones(2, 3, 7, 8).int()}, TypeError, "query must be float32"),
    "query's rank": ({"query": torch.ones(8)}, ValueError, "query must be"),
    "key's rank": ({"key": torch.ones(8)}, ValueError, "key must be"),
    "key's head_dim": (
        {"key": torch.ones(2, 3, 7, 9)},
        ValueError,
        "key must have query's head_dim 8",
    ),
    "key's dtype": (
        {"key": torch.ones(2, 3, 7, 8).half()},
        TypeError,
        "key must have query's dtype",
    ),
    "key's batch": ({"key": torch.ones(5, 3, 7, 8)}, ValueError, "axes before the last two"),
    "value's length": (
        {"value": torch.ones(2, 3, 6, 8)},
        ValueError,
        "value must have key's length 7",
    ),
    "heads": ({"query": torch.ones(2, 6, 7, 8)}, ValueError, "enable_gqa=True allows"),
    "no heads": ({"query": torch.ones(2, 0, 7, 8)}, ValueError, "axes before the last two"),
    "grouped heads": (
        {"query": torch.ones(2, 4, 7, 8), "enable_gqa": True},
        ValueError,
        "query must have as many heads as key and value, 3, got 4",
    ),
    "no values": ({"value": None}, ValueError, "value and v_first are both None"),
    "v_first's head_dim": ({"v_first": torch.ones(2, 3, 7, 4)}, ValueError, "v_first must have"),
    "v_first's device": (
        {"v_first": torch.ones(2, 3, 7, 8, device="meta")},
        ValueError,
        "v_first must be on query's device",
    ),
    "coefficient per head": (
        {"v_first": torch.ones(2, 3, 7, 8), "lambda_v": torch.ones(3, 1)},
        ValueError,
        r"lambda_v must be .* per KV head has shape \(3, 1, 1\)",
    ),
    "coefficient that enlarges": (
        {"v_first": torch.ones(2, 3, 7, 8), "lambda_first": torch.ones(4, 1, 1, 1, 1)},
        ValueError,
        "lambda_first must be a float or a tensor that broadcasts",
    ),
    "coefficient without values": ({"lambda_v": torch.ones(())}, ValueError, "lambda_v"),
    "coefficient's type": (
        {"v_first": torch.ones(2, 3, 7, 8), "lambda_v": "half"},
        TypeError,
        "lambda_v must be a number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    changed, error, message = BAD[name]
    arguments: dict[str, Any] = {x: torch.ones(2, 3, 7, 8) for x in ("query", "key", "value")}
    with pytest.raises(error, match=message):
        sdpa(**{**arguments, **changed})
