"""Tensors that are not memory: every op hands them to their class, or refuses them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.attention.bias import causal_lower_right
from torch.testing._internal.two_tensor import TwoTensor

import resformer_kernels as ours
from resformer_kernels.compat import flash_attn, flash_attn_3, scaled_dot_product_attention

# Raised inside torch, once.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

Function = Callable[..., Any]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


x, packed, cache = rand(2, 5, 4, 8), rand(6, 4, 8), torch.zeros(2, 8, 4, 8, dtype=torch.int8)
offsets: dict[str, Any] = {"cu_seqlens_q": ints(0, 2, 6), "cu_seqlens_k": ints(0, 3, 6)}
lengths = {"max_seqlen_q": 4, "max_seqlen_k": 4}
mixed: dict[str, Any] = {"lambda_v": rand(4, 1), "lambda_first": rand(4, 8)}

CALLS: dict[Function, dict[str, Any]] = {
    ours.value_residual_attention: {
        **dict.fromkeys(("q", "k", "v", "v_first"), x), **mixed,
        "sinks": rand(4), "attn_bias": rand(5, 5),
    },
    ours.value_residual_attention_varlen: {
        **dict.fromkeys(("q", "k", "v", "v_first"), packed), **mixed, **offsets, **lengths,
        "sinks": rand(4), "attn_bias": rand(4, 4),
    },
    ours.attention_with_kvcache: {
        "q": x, "k_cache": cache, "v_cache": cache, "k": x[:, :1], "v": x[:, :1],
        "cache_seqlens": ints(3, 6), "block_table": ints(1, 0).view(2, 1),
        "key_mask": torch.ones(2, 8, dtype=torch.bool), "sinks": rand(4),
        "k_scale": rand(2, 8, 4), "v_scale": rand(2, 8, 4),
    },
    ours.mix_values: {"values": [x, x.cos()], "coefficients": [rand(4, 1), rand(2, 5, 1, 1)]},
    ours.mix_value_embedding: {
        "v": x, "table": rand(9, 4, 8), "token_ids": torch.arange(10).view(2, 5) % 9,
        "gate": rand(2, 5, 4, 1),
    },
    ours.linear_scan: {
        "gates": packed[..., 0], "tokens": packed[..., 1], "initial_state": rand(2, 4),
        "cu_seqlens": ints(0, 2, 6),
    },
    ours.reservoir_scan: {
        "inputs": rand(2, 5, 3), "weight": rand(4, 4), "input_weight": rand(4, 3),
        "leak": torch.rand(4), "bias": rand(4), "initial_state": rand(2, 4),
    },
    scaled_dot_product_attention: {
        **dict.fromkeys(("query", "key", "value", "v_first"), x.transpose(1, 2)),
        "lambda_v": rand(4, 1, 1), "lambda_first": rand(8), "attn_mask": rand(5, 5),
    },
    flash_attn.flash_attn_func: {**dict.fromkeys(("q", "k", "v", "v_first"), x), **mixed},
    flash_attn.flash_attn_kvpacked_func: {"q": x, "kv": rand(2, 5, 2, 4, 8)},
    flash_attn.flash_attn_qkvpacked_func: {"qkv": rand(2, 5, 3, 4, 8)},
    flash_attn.flash_attn_varlen_func: {
        **dict.fromkeys(("q", "k", "v", "v_first"), packed), **mixed, **offsets, **lengths
    },
    flash_attn.flash_attn_varlen_kvpacked_func: {
        "q": packed, "kv": rand(6, 2, 4, 8), **offsets, **lengths
    },
    flash_attn.flash_attn_varlen_qkvpacked_func: {
        "qkv": rand(6, 3, 4, 8), "cu_seqlens": ints(0, 2, 6), "max_seqlen": 4
    },
    flash_attn.flash_attn_with_kvcache: {
        "q": x, "k_cache": rand(2, 8, 4, 8), "v_cache": rand(2, 8, 4, 8), "k": x[:, :1],
        "v": x[:, :1], "v_first": x[:, :1], **mixed, "cache_seqlens": ints(3, 6),
        "cache_leftpad": ints(0, 1), "rotary_cos": rand(8, 2), "rotary_sin": rand(8, 2),
        "block_table": ints(1, 0).view(2, 1),
    },
    flash_attn_3.flash_attn_func: {**dict.fromkeys(("q", "k", "v", "v_first"), x), **mixed},
    flash_attn_3.flash_attn_qkvpacked_func: {"qkv": rand(2, 5, 12, 8), "num_heads_q": 4},
    flash_attn_3.flash_attn_varlen_func: {
        **dict.fromkeys(("q", "k", "v", "v_first"), packed), **mixed, **offsets, **lengths,
        "seqused_q": ints(2, 3), "seqused_k": ints(1, 3),
    },
    flash_attn_3.flash_attn_with_kvcache: {
        **dict.fromkeys(("q", "k", "v", "v_first"), packed), **mixed,
        "k_cache": rand(2, 16, 4, 8), "v_cache": rand(2, 16, 4, 8), "cache_seqlens": ints(3, 6),
        "cache_batch_idx": ints(1, 0), "cache_leftpad": ints(0, 1), "rotary_cos": rand(16, 2),
        "rotary_sin": rand(16, 2), "rotary_seqlens": ints(2, 5), "cu_seqlens_q": ints(0, 2, 6),
        "cu_seqlens_k_new": ints(0, 3, 6), "max_seqlen_q": 4,
    },
}  # fmt: skip
"""A call of every function, its tensors by the names that errors call them."""


def tensors() -> Iterator[tuple[Function, str]]:
    for function, arguments in CALLS.items():
        for name, value in arguments.items():
            if isinstance(value, (Tensor, list)):
                yield function, name


every_tensor = pytest.mark.parametrize(
    ("function", "name"),
    [pytest.param(f, name, id=f"{f.__module__.split('.')[-1]}-{f.__name__}-{name}")
     for f, name in tensors()],
)  # fmt: skip


def changed(function: Function, name: str, odd: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The call with one of its tensors, or the second of a list of them, made odd."""
    arguments = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in CALLS[function].items()
    }
    value = arguments[name]
    arguments[name] = [value[0], odd(value[1])] if isinstance(value, list) else odd(value)
    return arguments


def refused(function: Function, name: str, odd: Callable[[Tensor], Tensor], said: str) -> None:
    label = rf"{name}(\[1\])?" if isinstance(CALLS[function][name], list) else name
    with pytest.raises(TypeError, match=rf"^{label} must be .*{said}"):
        function(**changed(function, name, odd))


def jagged(like: Tensor) -> Tensor:
    return torch.nested.nested_tensor([like, like], layout=torch.jagged)


def nested(like: Tensor) -> Tensor:
    return torch.nested.nested_tensor([like, like])


def served(function: Function, name: str, kind: str) -> bool:
    """What a function takes, as its own tests hold. A jagged key makes a dense query the error."""
    named = (function.__name__, name, kind)
    jagged_ones = {
        ("scaled_dot_product_attention", x, "torch.jagged")
        for x in ("query", "key", "value", "v_first")
    }
    return named in jagged_ones | {("scaled_dot_product_attention", "attn_mask", "CausalBias")}


@every_tensor
def test_layouts_that_no_kernel_reads(function: Function, name: str) -> None:
    for odd, kind in (
        (nested, "nested tensor"),
        (jagged, "torch.jagged"),
        (Tensor.to_sparse, "torch.sparse_coo"),
    ):
        if not served(function, name, kind):
            refused(function, name, odd, kind)


@every_tensor
def test_a_named_mask_is_no_memory(function: Function, name: str) -> None:
    if not served(function, name, "CausalBias"):
        refused(function, name, lambda _: causal_lower_right(5, 5), "CausalBias")


@pytest.fixture(scope="module")
def distributed() -> Iterator[Callable[[Tensor], Tensor]]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda like: distribute_tensor(like, mesh, [Replicate()])
    dist.destroy_process_group()


def reorders(function: Function) -> bool:
    """Whether a drop-in reorders or rotates rows, which DTensors do not take part in."""
    cached = function.__name__ == "flash_attn_with_kvcache"
    return cached or function is flash_attn_3.flash_attn_varlen_func


@every_tensor
def test_a_distributed_tensor_beside_plain_ones(
    distributed: Callable[[Tensor], Tensor], function: Function, name: str
) -> None:
    """The error names a tensor that is not of the kind of the first."""
    if [f for f, _ in tensors()].count(function) == 1:
        return  # there is no other
    said = r"must be a (plain tensor, .*got a DTensor|DTensor, .*got a plain tensor)"
    with pytest.raises(TypeError, match=said):
        function(**changed(function, name, distributed))


@pytest.mark.parametrize("function", CALLS)
def test_distributed_tensors_alone(
    distributed: Callable[[Tensor], Tensor], function: Function
) -> None:
    """`tests/distributed` splits them over ranks."""
    arguments = {
        name: [distributed(x) for x in value]
        if isinstance(value, list)
        else distributed(value.clone())
        if isinstance(value, Tensor)
        else value
        for name, value in CALLS[function].items()
    }
    if reorders(function):
        with pytest.raises(TypeError, match="must be a plain tensor, got a DTensor, whose rows"):
            function(**arguments)
        return
    expected = function(**changed(function, next(iter(arguments)), Tensor.clone))
    for x, y in zip(_listed(function(**arguments)), _listed(expected), strict=True):
        assert isinstance(x, DTensor)
        torch.testing.assert_close(x.full_tensor(), y)


class Labelled(Tensor):
    """A subclass with memory of its own."""


@every_tensor
def test_a_subclass_with_memory_is_read(function: Function, name: str) -> None:
    expected = function(**changed(function, name, Tensor.clone))
    for odd in (lambda like: like.as_subclass(Labelled), lambda like: nn.Parameter(like, False)):
        torch.testing.assert_close(function(**changed(function, name, odd)), expected)


@every_tensor
def test_a_wrapper_serves_the_op_by_its_own_dispatch(function: Function, name: str) -> None:
    """A TwoTensor holds two tensors, and runs an op on both."""
    expected = function(**changed(function, name, Tensor.clone))
    found = function(**changed(function, name, lambda like: TwoTensor(like, like.clone())))
    for both, one in zip(_listed(found), _listed(expected), strict=True):
        torch.testing.assert_close(both.a if isinstance(both, TwoTensor) else both, one)


def _listed(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]
