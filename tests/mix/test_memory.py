"""Memory: the tensors saved for backward; rows of a table are never materialised."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from resformer_kernels import mix_value_embedding, mix_values
from tests.machinery import saved_bytes


def largest_allocation(function: Any) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    sizes = [event.cpu_memory_usage for event in profiler.events() or []]
    return max(sizes)


def embedding_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v, table = (torch.randn(*rows, 2, 64, requires_grad=True) for rows in ((4, 512), (32,)))
    gate = torch.randn(4, 512, 2, 1, requires_grad=True)
    return v, table, torch.randint(32, (4, 512)), gate


def test_values_with_float_coefficients_save_nothing(kernels: str) -> None:
    values = [torch.randn(2, 64, 2, 16, requires_grad=True) for _ in range(3)]
    assert saved_bytes(lambda: mix_values(values, [0.5, 0.25, 0.25], backend=kernels)) == 0


def test_only_values_with_a_learned_coefficient_are_saved(kernels: str) -> None:
    values = [torch.randn(2, 64, 2, 16, requires_grad=True) for _ in range(3)]
    learned = torch.tensor(0.5, requires_grad=True)
    one = values[1].untyped_storage().nbytes()
    coefficients: list[float | Tensor] = [0.5, learned, torch.tensor(2.0)]
    kept = saved_bytes(lambda: mix_values(values, coefficients, backend=kernels))
    assert one <= kept <= one + 64


def test_an_embedding_saves_no_rows(kernels: str) -> None:
    v, table, ids, gate = embedding_inputs()
    sources = [x.untyped_storage().nbytes() for x in (table, gate, ids)]
    call = functools.partial(mix_value_embedding, v, table, ids, gate, backend=kernels)
    assert saved_bytes(call) <= sum(sources)


def test_an_embedding_never_makes_the_rows(kernels: str) -> None:
    # Rows of 2048 tokens are 64 times the table: whatever held them would stand out.
    v, table, ids, gate = embedding_inputs()
    out = mix_value_embedding(v, table, ids, gate, backend=kernels)
    grad = torch.randn_like(out)
    rows = out.untyped_storage().nbytes()

    def backward() -> None:
        torch.autograd.grad(out, (v, table, gate), grad)

    assert largest_allocation(backward) < rows / 8

    def forward() -> Tensor:
        with torch.no_grad():
            return mix_value_embedding(v, table, ids, gate, backend=kernels)

    # The result itself is as large as the rows, and is all there is.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward()
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events() or [])
    assert rows <= taken < rows * 9 / 8
