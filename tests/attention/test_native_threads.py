"""Work cut among threads: by heads, by tiles, and along the keys where there are few of both.

Workers of the test suite have one thread each, under which nothing is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from resformer_kernels.testing import AttentionCase, attention_inputs, compare_case
from tests.attention.cases import TABLE

THREADS = 4
# One case for each way to split the work: keys merged by LSE, waves of tiles, whole heads a thread.
SHAPES = {
    "decode": AttentionCase(batch=1, q_len=1, k_len=1500, heads=4, kv_heads=1, sinks=True),
    "few_tiles": AttentionCase(batch=1, q_len=70, k_len=900, heads=2, kv_heads=1, causal=True),
    "windowed": AttentionCase(batch=1, q_len=700, k_len=700, heads=1, kv_heads=1, window=(90, 0)),
    "waves": AttentionCase(batch=1, q_len=500, k_len=500, heads=6, kv_heads=3, head_dim=64),
    "whole_heads": AttentionCase(batch=8, q_len=70, k_len=70, heads=8, kv_heads=8, causal=True),
    "bias_of_all_heads": AttentionCase(q_len=130, k_len=400, bias="additive", softcap=5.0),
    "bias_of_rows": AttentionCase(q_len=130, k_len=400, bias="per_head"),
}
pytestmark = pytest.mark.usefixtures("native", "threads")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def mixing(name: str, dtype: torch.dtype) -> AttentionCase:
    return dataclasses.replace(
        SHAPES[name], dtype=dtype, lambda_v="scalar", lambda_first="channel", return_lse=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_a_cut_call_stays_within_budget(name: str, dtype: torch.dtype) -> None:
    case = mixing(name, dtype)
    wrong = [str(row) for row in compare_case(case, backend="native") if not row.ok]
    assert not wrong, f"{case}: {wrong}"


@pytest.mark.parametrize("name", TABLE)
def test_edge_shapes_stay_within_budget(name: str) -> None:
    wrong = [str(row) for row in compare_case(TABLE[name], backend="native") if not row.ok]
    assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_change_from_run_to_run(name: str) -> None:
    inputs = attention_inputs(mixing(name, torch.float32))
    runs = []
    for _ in range(3):
        leaves = {
            key: x.detach().clone().requires_grad_() if x.is_floating_point() else x
            for key, x in inputs.tensors.items()
        }
        outputs = inputs.function(**leaves, **inputs.options, backend="native")
        wanted = [x for x in leaves.values() if x.requires_grad]
        runs.append([*outputs, *torch.autograd.grad(outputs, wanted, inputs.grads)])
    for later in runs[1:]:
        for first, again in zip(runs[0], later, strict=True):
            assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "decode"])
def test_bits_of_gradients_do_not_depend_on_threads(name: str, dtype: torch.dtype) -> None:
    inputs = attention_inputs(mixing(name, dtype))
    leaves = {
        key: x.detach().clone().requires_grad_() if x.is_floating_point() else x
        for key, x in inputs.tensors.items()
    }
    outputs = inputs.function(**leaves, **inputs.options, backend="native")
    wanted = [x for x in leaves.values() if x.requires_grad]
    found = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found.append(torch.autograd.grad(outputs, wanted, inputs.grads, retain_graph=True))
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            assert torch.equal(first, other)
