"""What a call takes beside its inputs, against torch's own attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.call_memory import peak_call_bytes, unavailable_reason
from resformer_kernels import value_residual_attention
from resformer_kernels.bench.attention import AttentionBenchmark, mix_and_sdpa


@pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
@pytest.mark.usefixtures("native", "two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_takes_no_more_memory_than_sdpa(dtype: torch.dtype) -> None:
    case = AttentionBenchmark(1, 4, 4, 8192, 64, dtype, "backward")
    leaves, grad = [x.requires_grad_() for x in case.leaves()], case.grad()

    def most(attend: Callable[..., Tensor]) -> int:
        out = attend(*leaves)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        return max(peak_call_bytes(backward) for _ in range(2))

    ours = most(lambda *given: value_residual_attention(*given, causal=True, backend="native"))
    assert ours <= most(lambda *given: mix_and_sdpa(*given).transpose(1, 2))
