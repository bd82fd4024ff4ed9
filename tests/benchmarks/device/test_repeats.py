"""Ops that run again on the same inputs, and one whose bits are not always the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.device.repeats import Recorded
from resformer_kernels import attention_with_kvcache, linear_scan
from resformer_kernels._core.op import NATIVE

WRONG_AT = 5


@pytest.fixture
def flaky() -> Iterator[torch.library.Library]:
    """An op of this package's namespace that gives another bit in one of its runs."""
    library = torch.library.Library(NATIVE, "FRAGMENT")
    runs = iter(range(1, 1000))

    def double(x: Tensor) -> Tensor:
        out = 2 * x
        if next(runs) == WRONG_AT:
            out[3] = torch.nextafter(out[3], out[3] + 1)
        return out

    library.define("flaky_for_a_test(Tensor x) -> Tensor")
    library.impl("flaky_for_a_test", double, "CPU")
    yield library
    library._destroy()


@pytest.mark.usefixtures("flaky")
def test_one_other_bit_in_one_run_is_found() -> None:
    with Recorded() as recorded:
        torch.ops.resformer.flaky_for_a_test(torch.randn(8))
    assert recorded.differing(WRONG_AT - 1) == ""
    with Recorded() as recorded:
        torch.ops.resformer.flaky_for_a_test(torch.randn(8))
    # The fifth run was the first of this record; its repeats are like one another, not like it.
    assert "run 2 of resformer.flaky_for_a_test" in recorded.differing(20)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_forward_and_backward_are_recorded_and_the_same(backend: str, native: str) -> None:
    assert native == "native"
    gates, tokens = torch.rand(1, 6, 4), torch.randn(1, 6, 4)
    leaves = [gates.requires_grad_(), tokens.requires_grad_()]
    with Recorded() as recorded:
        states, _ = linear_scan(*leaves, backend=backend)
        torch.autograd.grad(states.sum(), leaves)
    assert len(recorded.ops) == 2
    assert recorded.differing(3) == ""


def test_what_a_call_writes_is_put_back_before_it_runs_again(native: str) -> None:
    q, k, v = (torch.randn(2, 1, 2, 8) for _ in range(3))
    k_cache, v_cache = (torch.zeros(2, 9, 2, 8) for _ in range(2))
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    with Recorded() as recorded:
        attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, backend=native)
    (ran,) = recorded.ops
    assert len(ran.written) >= 2
    assert recorded.differing(3) == ""
    # Left as the call left them.
    assert torch.equal(k_cache[0, 3], k[0, 0])


def test_other_packages_ops_are_left_alone() -> None:
    with Recorded() as recorded:
        torch.nn.functional.scaled_dot_product_attention(*(torch.randn(1, 1, 4, 8),) * 3)
    assert recorded.ops == []
