"""Where `auto` takes FlashAttention before our kernels: on a GPU that need not be there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resformer_kernels import explain, value_residual_attention, value_residual_attention_varlen
from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._core.select import Explanation, prepare
from tests.attention.fake_flash_attn import Fake
from tests.attention.fake_flash_attn_4 import MODULE, Fake4


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of capability 9.0, Triton, and no FlashAttention; tensors have no memory."""
    monkeypatch.setattr(MACHINE, "capability", lambda _device: (9, 0))
    monkeypatch.setattr(MACHINE, "triton_reason", lambda _device: None)
    monkeypatch.setattr(MACHINE, "packages", {})
    for module in (MODULE, "flash_attn_interface", "fa3_fwd_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    with FakeTensorMode():
        yield


def install(monkeypatch: pytest.MonkeyPatch, generation: int) -> None:
    if generation == 4:
        monkeypatch.setitem(sys.modules, MODULE, Fake4().module())
        return
    name = "flash_attn" if generation == 2 else "flash_attn_interface"
    monkeypatch.setitem(sys.modules, name, Fake(generation).module(name))
    config: Any = ModuleType("flash_attn_config")
    config.CONFIG = {"build_flags": {}}
    monkeypatch.setitem(sys.modules, "flash_attn_config", config)


def asked(
    function: Callable[..., Any],
    length: int = 4096,
    head_dim: int = 128,
    value_dim: int = 0,
    trains: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Any:
    """`function`, which is `explain` or `prepare`, of a call."""

    def rows(size: int) -> Tensor:
        made = torch.empty(2, length, 4, size, dtype=dtype, device="cuda")
        return made.requires_grad_(trains)

    tensors = [rows(size) for size in (head_dim, head_dim, *[value_dim or head_dim] * 2)]
    return function(value_residual_attention, *tensors, **options)


def chosen(**case: Any) -> Explanation:
    found: Explanation = asked(explain, **case)
    return found


@pytest.mark.parametrize("generation", [4, 3])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"causal": True},
        {"head_dim": 64, "length": 512},
        {"head_dim": 64, "length": 2048, "trains": False},
        {"head_dim": 128, "length": 512, "trains": False},
        {"head_dim": 256, "trains": False},
        {"window": (4096, 0)},
    ],
)
def test_auto_prefers_it_where_figures_say_so(
    monkeypatch: pytest.MonkeyPatch, generation: int, case: dict[str, Any]
) -> None:
    assert chosen(**case).backend == "triton"
    monkeypatch.setattr(MACHINE, "packages", {})
    install(monkeypatch, generation)
    found = chosen(**case)
    assert found.backend == "flash_attn"
    assert found.reasons["triton"] == "flash_attn is preferred"
    served_by = {4: MODULE, 3: "flash_attn_interface"}[generation]
    assert found.notes[0] == f"{served_by} serves it"
    assert chosen(**case, backend="triton").backend == "triton"


@pytest.mark.parametrize(
    "case",
    [
        {"head_dim": 32},
        {"head_dim": 64, "length": 2047, "trains": False},
        {"head_dim": 64, "length": 511},
        {"head_dim": 64, "value_dim": 128},
        {"window": (512, 0)},
        {"softcap": 20.0},
        {"scale": -1.0},
        {"dtype": torch.float32},
    ],
)
def test_elsewhere_ours_are_first_and_nothing_is_imported(
    monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]
) -> None:
    install(monkeypatch, 4)
    names = [backend.NAME for backend in asked(prepare, **case).backends]
    assert names.index("triton") < names.index("flash_attn")
    assert MACHINE.packages == {}
    assert chosen(**case).backend == "triton"


@pytest.mark.parametrize(
    ("major", "generation", "case", "backend"),
    [
        (10, 4, {}, "flash_attn"),
        (10, 4, {"length": 1023}, "triton"),
        (10, 4, {"head_dim": 256}, "triton"),
        (10, 3, {}, "triton"),
        (8, 2, {}, "triton"),
        (9, 2, {}, "triton"),
        (12, 4, {}, "triton"),
    ],
)
def test_each_generation_is_first_on_its_own_gpus(
    monkeypatch: pytest.MonkeyPatch,
    major: int,
    generation: int,
    case: dict[str, Any],
    backend: str,
) -> None:
    monkeypatch.setattr(MACHINE, "capability", lambda _device: (major, 0))
    install(monkeypatch, generation)
    assert chosen(**case).backend == backend


def test_version_4_serves_before_3_and_what_it_lacks_goes_to_3(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, 4)
    install(monkeypatch, 3)
    assert chosen().notes[0] == f"{MODULE} serves it"
    broken = Fake4().module()
    del broken._flash_attn_bwd
    monkeypatch.setitem(sys.modules, MODULE, broken)
    monkeypatch.setattr(MACHINE, "packages", {})
    assert chosen().notes[0] == "flash_attn_interface serves it"


def test_packed_sequences_count_by_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, 4)
    q, k, v = (torch.empty(4096, 4, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    cu = torch.empty(9, dtype=torch.int32, device="cuda")
    for longest, backend in ((512, "flash_attn"), (511, "triton")):
        found = explain(
            value_residual_attention_varlen,
            *(q, k, v),
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=longest,
            max_seqlen_k=4096,
        )
        assert found.backend == backend
