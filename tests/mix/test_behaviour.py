"""Behaviour of every backend, and the native one's promises about bits, NaN and strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resformer_kernels import explain, mix_value_embedding, mix_values, value_residual_attention
from tests.machinery import threads
from tests.mix.cases import DTYPES, Case, embedding_call, run, values_call

FORMS = ("scalar", "head", "channel", "token", "token_head", "full", "position")


def all_bits(case: Case) -> list[Tensor]:
    found = []
    for make in (values_call, embedding_call):
        forms = case.forms if make is values_call else case.forms[:1]
        call = make(Case(**{**case.__dict__, "forms": forms}), "native")
        found += run(call, call.leaves, call.grad)
    return found


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    case = Case((3, 700), 3, 40, dtype, FORMS)
    with threads(1):
        alone = all_bits(case)
    with threads(4):
        several = [all_bits(case) for _ in range(3)]
    for again in several:
        assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


@pytest.mark.parametrize("layout", ["heads_first", "sliced", "strided"])
def test_strides_change_no_bits(layout: str, native: str) -> None:
    case = Case((2, 31), 3, 24, torch.bfloat16, ("head", "full", "float"))
    plain, laid = values_call(case, native), values_call(case, native)
    other = values_call(Case(**{**case.__dict__, "layout": layout, "grad_layout": layout}), native)
    assert all(torch.equal(a, b) for a, b in zip(plain.leaves, other.leaves, strict=True))
    out, again = (run(c, c.leaves, c.grad)[0] for c in (laid, other))
    torch.testing.assert_close(out, again, rtol=2**-8, atol=1e-6)


def test_only_a_strided_last_axis_is_copied(native: str) -> None:
    v = torch.randn(1, 4, 2, 8)
    table = torch.randn(5, 2, 16)[..., ::2]
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert explain(mix_values, [v, v], [0.5, 0.5], backend=native).notes == []
    moved = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert explain(mix_values, [moved], [0.5]).notes == []
    (note,) = explain(mix_value_embedding, v, table, ids, 0.5).notes
    assert note.startswith("table is copied once")


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate(special: float, backend: str) -> None:
    v, first = torch.randn(1, 3, 2, 5), torch.randn(1, 3, 2, 5)
    first[0, 1, 0, 2] = special
    out = mix_values([v, first], [1.0, 0.5], backend=backend)
    expected = v + 0.5 * first
    torch.testing.assert_close(out, expected, equal_nan=True)
    silenced = mix_values([v, first], [1.0, 0.0], backend=backend)
    assert silenced[0, 1, 0, 2].isnan()
    assert int(silenced.isnan().sum()) == 1


def test_rows_that_no_token_picks_are_never_read(backend: str) -> None:
    table = torch.randn(6, 2, 4)
    table[3] = torch.nan
    table.requires_grad_()
    ids = torch.tensor([[0, 1, 2, 5, 5]])
    out = mix_value_embedding(torch.randn(1, 5, 2, 4), table, ids, 0.5, backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), table)
    assert out.isfinite().all()
    assert torch.equal(gradient[3:5], torch.zeros(2, 2, 4))
    torch.testing.assert_close(gradient[5], torch.full((2, 4), 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_gradient_is_the_dense_one(dtype: torch.dtype, backend: str) -> None:
    v, table = torch.randn(2, 6, 2, 4).to(dtype), torch.randn(50, 2, 4, requires_grad=True)
    ids = torch.tensor([[7, 3, 7, 49, 0, 3], [7, 7, 3, 3, 0, 0]], dtype=torch.int32)
    gradients: list[Tensor] = []
    for sparse_grad in (False, True):
        out = mix_value_embedding(v, table, ids, 0.3, sparse_grad=sparse_grad, backend=backend)
        gradients += torch.autograd.grad(out, table, torch.ones_like(out))
    dense, sparse = gradients
    assert sparse.is_coalesced()
    assert sparse.indices().tolist() == [[0, 3, 7, 49]]
    torch.testing.assert_close(sparse.to_dense(), dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_over_the_mix_is_attention_that_mixes(dtype: torch.dtype, native: str) -> None:
    q, k, v, first = (torch.randn(1, 20, 2, 16).to(dtype) for _ in range(4))
    own = torch.randn(2, 1)
    _, fused = value_residual_attention(
        q, k, v, first, own, 0.3, return_mixed_value=True, backend=native
    )
    mixed = mix_values([v, first], [own, 0.3], backend=native)
    torch.testing.assert_close(mixed, fused, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_inputs_are_untouched(backend: str) -> None:
    for make in (values_call, embedding_call):
        call = make(Case((2, 5), 2, 6, torch.float32, ("full",), vocab=3), backend)
        before = [x.clone() for x in call.leaves]
        run(call, call.leaves, call.grad)
        assert all(torch.equal(a, b) for a, b in zip(before, call.leaves, strict=True))


def test_output_is_no_alias(backend: str) -> None:
    v = torch.randn(1, 3, 2, 4)
    out = mix_values([v], [1.0], backend=backend)
    assert torch.equal(out, v)
    assert out.data_ptr() != v.data_ptr()


@pytest.mark.slow
def test_more_elements_than_an_int32_counts(native: str) -> None:
    rows, dim = 2**20 + 1, 2048
    v = torch.zeros(1, dtype=torch.bfloat16).expand(1, rows, 1, dim)
    gate = torch.zeros(1, rows, 1, 1)
    gate[0, -1] = 2.0
    out = mix_value_embedding(
        v,
        torch.ones(3, 1, dim).bfloat16(),
        torch.ones(1, rows, dtype=torch.int32),
        gate,
        backend=native,
    )
    assert torch.equal(out[0, -1], torch.full((1, dim), 2.0).bfloat16())
    assert not out[0, -2].any()
