"""What PyTorch's scaled_dot_product_attention takes beside plain tensors of one rank: named masks,
jagged tensors, mixed ranks, and axes of size 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

from resformer_kernels import explain, value_residual_attention
from resformer_kernels.compat import scaled_dot_product_attention as sdpa
from tests.compat.documented import rand

pytestmark = pytest.mark.filterwarnings(
    # Raised inside torch.
    "ignore:The PyTorch API of nested tensors",
    "ignore:Lower right causal bias will produce NaNs",
)

Shape = tuple[int, ...]
theirs: Any = functional.scaled_dot_product_attention
ours: Any = sdpa


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Outputs and gradients."""
    assert found.shape == expected.shape
    grad = rand(*expected.shape)
    both = [(x, *torch.autograd.grad(x, leaves, grad)) for x in (found, expected)]
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-10)


def leaves(*shapes: Shape) -> Any:
    return [rand(*shape).add(i / 8).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("lengths", [(5, 5), (5, 9), (9, 5)])
@pytest.mark.parametrize("made", [causal_upper_left, causal_lower_right])
def test_a_named_mask(made: Any, lengths: tuple[int, int]) -> None:
    tq, tk = lengths
    wrt = leaves((2, 4, tq, 8), (2, 4, tk, 8), (2, 4, tk, 8))
    mask = torch.ones(lengths, dtype=torch.bool).tril(0 if made is causal_upper_left else tk - tq)
    found = ours(*wrt, attn_mask=made(*lengths))
    if tq > tk and made is causal_lower_right:  # PyTorch: NaN for queries without keys
        q, k, v = (x.transpose(1, 2) for x in wrt)
        expected = value_residual_attention(q, k, v, causal=True).transpose(1, 2)
    else:
        expected = theirs(*wrt, attn_mask=mask)
        torch.testing.assert_close(theirs(*wrt, attn_mask=made(*lengths)), expected)
    assert_same(found, expected, wrt)


def test_a_named_mask_and_what_comes_with_it() -> None:
    wrt = leaves((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 1, 1))
    q, k, v, first, gate = wrt
    found = sdpa(
        q, k, v, causal_lower_right(5, 9), scale=0.2, enable_gqa=True, v_first=first, lambda_v=gate
    )
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    expected = theirs(q, k, gate * v + 0.5 * first, mask, scale=0.2, enable_gqa=True)
    assert_same(found, expected, wrt)


def test_a_named_mask_of_other_lengths() -> None:
    """As PyTorch: the lengths of one that is square, or aligned at the start, do not matter."""
    q, k, v = leaves((2, 4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 8))
    for bias in (causal_upper_left(3, 4), causal_lower_right(7, 7)):
        expected = theirs(q, k, v, bias)
        torch.testing.assert_close(sdpa(q, k, v, bias), expected)
    with pytest.raises(ValueError, match=r"attn_mask must be made for 5 queries and 9 keys, got"):
        sdpa(q, k, v, causal_lower_right(5, 8))
    with pytest.raises(ValueError, match="attn_mask must be None with is_causal"):
        sdpa(q, k, v, causal_upper_left(5, 9), is_causal=True)


RANKS: dict[str, tuple[Shape, ...]] = {
    "fewer of query": ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "fewer of keys": ((2, 3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "no heads but of query": ((2, 3, 5, 8), (7, 8), (7, 8)),
    "fewer of values": ((2, 3, 5, 8), (2, 3, 7, 8), (3, 7, 6)),
    "five and three": ((3, 5, 8), (2, 2, 3, 7, 8), (3, 7, 8)),
}
EMPTY: dict[str, tuple[Shape, ...]] = {
    "no channels": ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 4)),
    "no channels of values": ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 0)),
    "no channels at all": ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 0)),
    "no queries": ((2, 3, 0, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
    "no keys": ((2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 4)),
    "no batch": ((0, 3, 5, 4), (0, 3, 7, 4), (0, 3, 7, 4)),
    "no heads": ((2, 0, 5, 4), (2, 0, 7, 4), (2, 0, 7, 4)),
    "no batch of three axes": ((0, 5, 4), (0, 7, 4), (0, 7, 4)),
    "no leading axis of five": ((2, 0, 3, 5, 4), (2, 0, 3, 7, 4), (2, 0, 3, 7, 4)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [*RANKS, *EMPTY])
def test_ranks_and_empty_axes(name: str, causal: bool) -> None:
    wrt = leaves(*{**RANKS, **EMPTY}[name])
    expected = theirs(*wrt, is_causal=causal)
    assert_same(ours(*wrt, is_causal=causal), expected, wrt)


@pytest.mark.parametrize("name", EMPTY)
def test_empty_axes_of_mixed_values(name: str) -> None:
    q, k, v = leaves(*EMPTY[name])
    gate = rand(*v.shape[:-1], 1).requires_grad_()
    found = sdpa(q, k, v, v_first=v.cos(), lambda_v=gate)
    expected = theirs(q, k, gate * v + 0.5 * v.cos())
    assert_same(found, expected, [q, k, v, gate])


def jagged(lengths: Shape, heads: int, dim: int, seed: int = 0) -> Tensor:
    """(B, heads, *, dim)."""
    rows = [rand(length, heads, dim).add(seed / 8) for length in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


def each(x: Tensor) -> list[Tensor]:
    return [row[None] for row in x.unbind()]


QUERIES, KEYS = (3, 5, 1), (4, 2, 7)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [QUERIES, KEYS])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_jagged_tensors(kv_heads: int, keys: Shape, causal: bool) -> None:
    """Each sequence as dense tensors have it; PyTorch has no grouped heads or causal mask here."""
    x, y, z, first = (
        jagged(QUERIES, 4, 8), jagged(keys, kv_heads, 8, 1), jagged(keys, kv_heads, 6, 2),
        jagged(keys, kv_heads, 6, 3),
    )  # fmt: skip
    q, k, v, w = (t.transpose(1, 2) for t in (x, y, z, first))
    gate = rand(kv_heads, 1, 1).requires_grad_()
    gqa = kv_heads != 4
    out = sdpa(q, k, v, is_causal=causal, scale=0.3, enable_gqa=gqa, v_first=w, lambda_v=gate)
    assert out.layout is torch.jagged
    assert out.shape[:3] == q.shape[:3]  # with the ragged axis of query
    expected = [
        theirs(a, b, gate * c + 0.5 * d, is_causal=causal, scale=0.3, enable_gqa=gqa)
        for a, b, c, d in zip(*map(each, (q, k, v, w)), strict=True)
    ]
    for one, other in zip(each(out), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    wrt = [x, y, z, first, gate]
    total = torch.cat([one.flatten() for one in expected]).square().sum()
    both = [torch.autograd.grad(y, wrt) for y in (out.values().square().sum(), total)]
    for a, b in zip(*both, strict=True):
        values = (t.values() if t.layout is torch.jagged else t for t in (a, b))
        torch.testing.assert_close(*values, rtol=1e-10, atol=1e-10)


def test_jagged_tensors_as_pytorch_has_them() -> None:
    q, k, v = (jagged(n, 2, 8, i).transpose(1, 2) for i, n in enumerate((QUERIES, KEYS, KEYS)))
    expected = theirs(q, k, v, scale=0.3)
    torch.testing.assert_close(sdpa(q, k, v, scale=0.3).values(), expected.values())
    # Sequences along the axis of heads: each row of a sequence is attended by itself.
    q, k, v = (jagged(QUERIES, 2, 8, i) for i in range(3))
    for causal in (False, True):
        expected = theirs(q, k, v, is_causal=causal)
        found = sdpa(q, k, v, is_causal=causal)
        assert found._ragged_idx == 1  # type: ignore[attr-defined]
        torch.testing.assert_close(found.values(), expected.values())


def test_jagged_tensors_reach_the_kernels(native: str) -> None:
    q, k, v = (jagged(QUERIES, 2, 8, i).float().transpose(1, 2) for i in range(3))
    found = explain(sdpa, q, k, v)
    assert found.op == "value_residual_attention_varlen"
    assert found.backend == native
    assert not found.notes  # nothing is copied


def test_jagged_coefficients_and_first_values_alone() -> None:
    q, k = (jagged(QUERIES, 2, 8, i).transpose(1, 2) for i in range(2))
    gate = jagged(QUERIES, 2, 1, 4).transpose(1, 2)
    found = sdpa(q, k, k, v_first=q, lambda_v=gate, lambda_first=torch.tensor(0.25).double())
    for one, a, b, c in zip(*map(each, (found, q, k, gate)), strict=True):
        expected = theirs(a, b, c * b + 0.25 * a)
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)
    alone, plain = sdpa(q, k, None, v_first=q), sdpa(q, k, q)
    assert torch.equal(alone.values(), plain.values())


def holes() -> Tensor:
    dense, start, length = rand(3, 8, 2, 8), torch.tensor([0, 1, 2]), torch.tensor([3, 5, 1])
    return torch.nested.narrow(dense, 1, start, length, layout=torch.jagged).transpose(1, 2)


def bad(case: str) -> dict[str, Any]:
    j = jagged(QUERIES, 2, 8).transpose(1, 2)
    changes: dict[str, Any] = {
        "a dense key": {"key": rand(3, 2, 5, 8)},
        "no value": {"value": None},
        "a mask": {"attn_mask": torch.zeros(5, 5)},
        "a named mask": {"attn_mask": causal_upper_left(5, 5)},
        "other sequences": {"value": jagged((3, 1, 5), 2, 8).transpose(1, 2)},
        "another batch": {"key": jagged((4, 5), 2, 8).transpose(1, 2), "value": j},
        "heads": {"query": jagged(QUERIES, 4, 8).transpose(1, 2)},
        "heads of values": {"value": jagged(QUERIES, 4, 8).transpose(1, 2)},
        "another axis": {"key": jagged(QUERIES, 2, 8)},
        "holes": {"query": holes()},
        "a dtype": {"key": j.float()},
        "channels": {"key": jagged(QUERIES, 2, 4).transpose(1, 2)},
        "a coefficient": {"v_first": j, "lambda_v": rand(3, 1, 1, 1)},
    }
    return {"query": j, "key": j, "value": j, **changes[case]}


BAD: dict[str, tuple[type[Exception], str]] = {
    "a dense key": (TypeError, "key must be a jagged nested tensor"),
    "no value": (ValueError, "value and v_first are both None"),
    "a mask": (ValueError, "attn_mask must be None with nested tensors"),
    "a named mask": (ValueError, "attn_mask must be None with nested tensors"),
    "other sequences": (ValueError, r"value must have key's sequences, of offsets \[0, 3, 8, 9\]"),
    "another batch": (ValueError, "key must have query's batch size 3, got 2"),
    "heads": (ValueError, "query must have as many heads as key and value, 2, got 4"),
    "heads of values": (ValueError, "value must have key's 2 heads, got 4"),
    "another axis": (ValueError, r"key must be a jagged nested tensor \(B, heads, \*, head_dim\)"),
    "holes": (ValueError, "query must be a jagged .* without holes"),
    "a dtype": (TypeError, "key must have query's dtype"),
    "channels": (ValueError, "key must have query's head_dim 8"),
    "a coefficient": (ValueError, "lambda_v must be a float, jagged as value is, or broadcast"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_jagged_input_is_named(case: str) -> None:
    error, said = BAD[case]
    with pytest.raises(error, match=said):
        sdpa(**bad(case))


def test_the_named_mask_has_no_values() -> None:
    """Why the class is known by name: its memory is a tensor of other axes, never written."""
    bias = causal_lower_right(5, 9)
    assert isinstance(bias, CausalBias)
    assert bias.shape == (2, 5, 9)
