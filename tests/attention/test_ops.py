"""The ops under the public functions: opcheck, fakes, and what the gradient keeps in memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import value_residual_attention
from resformer_kernels._core.select import prepare
from resformer_kernels.attention.epilogue import keeping
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.testing import AttentionCase, attention_inputs

CASES = {
    "everything": AttentionCase(
        lambda_v="token_head", lambda_first="head", sinks=True, bias="additive", causal=True,
        softcap=5.0, return_lse=True, return_mixed_value=True, layout="heads_first",
    ),
    "bare": AttentionCase(sources="v", k_len=20, dtype=torch.bfloat16),
    "epilogue": AttentionCase(
        exclusive="token_head", out_gate="full", k_len=20, q_len=24, causal=True
    ),
    "packed": AttentionCase(lengths=((5, 7), (0, 2), (9, 9)), tail=2, lambda_v="scalar", slack=1),
}  # fmt: skip


def op_arguments(case: AttentionCase) -> tuple[AttentionCall, tuple[Any, ...]]:
    inputs = attention_inputs(case)
    call: AttentionCall = prepare(inputs.function, **inputs.tensors, **inputs.options).call
    if call.out_gate is not None:
        call = keeping(call._replace(out_gate=call.out_gate.clone().requires_grad_()))
        call = call._replace(out_gate=inputs.tensors["out_gate"])
    return call, tuple(call)


def namespace(kernels: str) -> Any:
    """The ops of a backend that has kernels."""
    return torch.ops.resformer if kernels == "native" else torch.ops.resformer_triton


@pytest.mark.parametrize("name", CASES)
def test_opcheck_forward(kernels: str, name: str) -> None:
    _, arguments = op_arguments(CASES[name])
    op = namespace(kernels).value_residual_attention_forward.default
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mask", [0b1111111111, 0b100])
def test_opcheck_backward(kernels: str, name: str, mask: int) -> None:
    case = dataclasses.replace(CASES[name], return_lse=True)
    call, arguments = op_arguments(case)
    forward = namespace(kernels).value_residual_attention_forward.default
    out, lse, _, along, ungated = forward(*arguments)
    kept = ungated if call.return_ungated else out
    leaves = call.leaves
    mask &= sum(1 << i for i, leaf in enumerate(leaves) if leaf is not None)
    op = namespace(kernels).value_residual_attention_backward.default
    along = along if call.excludes else None
    rest = (torch.ones_like(out), None, None, *arguments, kept, lse, along, mask)
    torch.library.opcheck(op, rest)
    for bit, (leaf, got) in enumerate(zip(leaves, op(*rest), strict=True)):
        assert got.shape == (leaf.shape if leaf is not None and mask >> bit & 1 else (0,))


def saved_elements(*inputs: Tensor, **options: Any) -> tuple[int, Tensor]:
    """Elements in distinct storages that autograd keeps, inputs apart."""
    seen: dict[int, int] = {}
    given = [*inputs, *(x for x in options.values() if isinstance(x, Tensor))]
    known = {x.untyped_storage().data_ptr() for x in given}

    def pack(x: Tensor) -> Tensor:
        pointer = x.untyped_storage().data_ptr()
        if pointer not in known:
            seen[pointer] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out: Tensor = value_residual_attention(*inputs, **options)
    return sum(seen.values()), out


@pytest.mark.parametrize("shape", [(), (2, 1), (2, 64, 2, 1), (2, 64, 2, 16)])
def test_mixing_saves_nothing_more_than_plain_attention(
    kernels: str, shape: tuple[int, ...]
) -> None:
    q, k, v, v_first = (torch.randn(2, 64, 2, 16, requires_grad=True) for _ in range(4))
    plain, out = saved_elements(q, k, v, backend=kernels)
    assert plain == out.numel() + 2 * 64 * 2
    own, first = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    mixed, _ = saved_elements(q, k, v, v_first, own, first, backend=kernels)
    assert mixed == plain


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("learned", [False, True])
def test_an_epilogue_saves_one_number_a_row_more(
    kernels: str, learned: bool, channels: int
) -> None:
    """Where the gate needs it, the output before the gate is saved in place of the output."""
    q, k, v = (torch.randn(2, 64, 2, 16, requires_grad=True) for _ in range(3))
    plain, _ = saved_elements(q, k, v, backend=kernels)
    exclusive = torch.randn(2, 64, 2, 1, requires_grad=True)
    alone, _ = saved_elements(q, k, v, exclusive=exclusive, backend=kernels)
    assert alone == plain + 2 * 64 * 2
    gate = torch.randn(2, 64, 2, channels, requires_grad=learned)
    both, _ = saved_elements(q, k, v, exclusive=exclusive, out_gate=gate, backend=kernels)
    assert both == alone
    gated, _ = saved_elements(q, k, v, out_gate=gate, backend=kernels)
    assert gated == plain


def test_saved_tensors_are_read_once(kernels: str) -> None:
    """Non-reentrant checkpointing recomputes at the first read and refuses a second."""
    leaves = [torch.randn(1, 8, 2, 8, requires_grad=True) for _ in range(4)]
    reads: list[int] = []

    def unpack(x: Tensor) -> Tensor:
        reads.append(id(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        out = value_residual_attention(*leaves, backend=kernels)
    out.sum().backward()
    assert len(reads) == len(set(reads)) == 6
