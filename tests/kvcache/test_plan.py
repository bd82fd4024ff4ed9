"""`plan_kvcache`: calls through a plan have the bits of calls without one, and its errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import attention_with_kvcache, explain, plan_kvcache
from resformer_kernels.kvcache.prepared import KVCachePlan
from resformer_kernels.testing.kvcache import KVCacheCase, KVCacheInputs, kvcache_inputs
from tests.backends import backend as backend  # Triton's interpreter too
from tests.kvcache.cases import TABLE

LAYER = (
    *("q", "k_cache", "v_cache", "k", "v", "k_scale", "v_scale"),
    *("sinks", "exclusive", "exclusive_eps", "out_gate", "out", "return_lse"),
)
"""Arguments that a layer gives beside a plan."""

CASES = {
    name: TABLE[name]
    for name in (
        "one token",
        "no sequence",
        "chunked prefill",
        "prompts beside decoded tokens",
        "packed, a mask",
        "keys alone beside V's own table",
        "nothing cached, a sink",
        "every argument",
        "decoded, excluded, gated",
        "packed codes, excluded, gated",
    )
}
CASES["int8"] = KVCacheCase(lengths=(70, 9), quantised=torch.int8, page_size=16, packed=True)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def split(inputs: KVCacheInputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a layer gives, what is planned) of a call."""
    given = {**inputs.tensors, **inputs.options}
    layer = {name: x for name, x in given.items() if name in LAYER}
    planned = {name: x for name, x in given.items() if name not in LAYER}
    return layer, planned


def plan_of(layer: dict[str, Any], planned: dict[str, Any], backend: str) -> KVCachePlan:
    names = LAYER[:7]
    tensors = {name: layer[name] for name in names if name in layer}
    return plan_kvcache(**tensors, **planned, backend=backend)


def results(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", CASES)
def test_a_planned_call_has_the_bits_of_a_plain_one(name: str, backend: str) -> None:
    inputs = kvcache_inputs(CASES[name])
    plain, planned = split(inputs)
    expected = results(attention_with_kvcache(**plain, **planned, backend=backend))
    layer, planned = split(kvcache_inputs(CASES[name]))
    untouched = {x: layer[x].clone() for x in ("k_cache", "v_cache")}
    plan = plan_of(layer, planned, backend)
    for x, before in untouched.items():
        assert torch.equal(layer[x].nan_to_num(7), before.nan_to_num(7))
    assert plan.backend == backend
    for _ in range(2):
        found = results(attention_with_kvcache(**layer, plan=plan))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    for x in untouched:
        assert torch.equal(layer[x].nan_to_num(7), plain[x].nan_to_num(7))


def test_one_plan_serves_layers_that_append_keys_alone(native: str) -> None:
    """SVFormer: V is appended by the first layer, and read by all."""
    layer, planned = split(kvcache_inputs(KVCacheCase(lengths=(30, 7), page_size=4)))
    plan = plan_of(layer, planned, native)
    first = attention_with_kvcache(**layer, plan=plan)
    keys = layer["k_cache"].clone()
    second = {**layer, "k_cache": keys, "k": layer["k"] + 1, "v": None}
    got = attention_with_kvcache(**second, plan=plan)
    again = {**second, "k_cache": layer["k_cache"].clone()}
    assert torch.equal(got, attention_with_kvcache(**again, **planned, backend=native))
    assert not torch.equal(got, first)


def planned_case() -> tuple[dict[str, Any], KVCachePlan]:
    layer, planned = split(kvcache_inputs(KVCacheCase(lengths=(30, 7), page_size=4)))
    return layer, plan_of(layer, planned, "reference")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "queries": ({"q": torch.randn(2, 2, 4, 16)}, ValueError, "q must have the planned shape"),
    "dtype": ({"q": torch.randn(2, 1, 4, 16).double()}, TypeError, "q must have the planned dtype"),
    "no tensor": ({"q": None}, TypeError, "q must be a tensor"),
    "pages": ({"k_cache": torch.randn(3, 4, 2, 16)}, ValueError, "k_cache must have the planned"),
    "new": ({"k": torch.randn(2, 2, 2, 16)}, ValueError, "k must have the planned shape"),
    "neither": ({"k": None, "v": None}, ValueError, "k or v must be given"),
    "scales": ({"k_scale": torch.ones(2)}, ValueError, "k_scale belongs to an int8"),
    "sinks": ({"sinks": torch.ones(3)}, ValueError, "sinks must be"),
    "exclusive": ({"exclusive": torch.ones(2, 1)}, ValueError, "exclusive must be a float or a"),
    "a bound": ({"exclusive": 1.0, "exclusive_eps": 0.0}, ValueError, "exclusive_eps must be from"),
    "a bound of nothing": ({"exclusive_eps": -1.0}, ValueError, "exclusive_eps must be from"),
    "a gate": ({"out_gate": torch.ones(2, 1, 4, 8)}, ValueError, "out_gate must be a tensor that"),
    "no gate": ({"out_gate": 1.0}, TypeError, "out_gate must be a tensor or None"),
    "out": ({"out": torch.ones(2, 1, 4, 8)}, ValueError, "out must have the result's shape"),
    "a flag": ({"return_lse": 1}, TypeError, "return_lse must be"),
    "lengths": ({"cache_seqlens": 4}, ValueError, "plan must be given with q, k_cache"),
    "an option": ({"causal": False}, ValueError, "plan must be given with q, k_cache"),
    "a backend": ({"backend": "native"}, ValueError, "plan must be given with q, k_cache"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_the_plan_is_named(name: str) -> None:
    layer, plan = planned_case()
    change, error, said = BAD[name]
    before = layer["k_cache"].clone()
    with pytest.raises(error, match=said):
        attention_with_kvcache(**{**layer, **change}, plan=plan)
    assert torch.equal(layer["k_cache"].nan_to_num(7), before.nan_to_num(7))


def test_a_cache_without_memory_of_its_own_is_refused() -> None:
    layer, plan = planned_case()
    layer["k_cache"] = layer["k_cache"][:1].expand_as(layer["k_cache"])
    with pytest.raises(ValueError, match="k_cache is expanded"):
        attention_with_kvcache(**layer, plan=plan)


def test_a_plan_without_new_tokens_takes_none() -> None:
    layer, planned = split(kvcache_inputs(KVCacheCase(append="none")))
    plan = plan_of(layer, planned, "reference")
    with pytest.raises(ValueError, match="k must be None: the plan has no new tokens"):
        attention_with_kvcache(**layer, k=torch.randn(2, 1, 2, 16), plan=plan)


def test_a_gradient_is_refused() -> None:
    layer, plan = planned_case()
    layer["q"].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="has no gradient, and q requires"):
        attention_with_kvcache(**layer, plan=plan)


def test_planning_raises_what_calling_raises() -> None:
    layer, planned = split(kvcache_inputs(KVCacheCase(lengths=(30, 7), page_size=4)))
    planned["cache_seqlens"] = planned["cache_seqlens"] + 900
    with pytest.raises(ValueError, match="the cache is full"):
        plan_of(layer, planned, "auto")
    with pytest.raises(ValueError, match="backend must be"):
        plan_of(*split(kvcache_inputs(KVCacheCase())), "fastest")


def test_explain_names_the_plans_backend(native: str) -> None:
    layer, planned = split(kvcache_inputs(KVCacheCase()))
    plan = plan_of(layer, planned, native)
    before = layer["k_cache"].clone()
    assert explain(attention_with_kvcache, **layer, plan=plan).backend == native
    tensors = {name: layer[name] for name in LAYER[:7] if name in layer}
    assert explain(plan_kvcache, **tensors, **planned).backend == native
    assert torch.equal(layer["k_cache"].nan_to_num(7), before.nan_to_num(7))
    assert native in repr(plan)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_one_graph_of_all_layers(native: str) -> None:
    layer, planned = split(kvcache_inputs(KVCacheCase(lengths=(30, 7), page_size=4)))
    plan = plan_of(layer, planned, native)
    other = {**layer, "k_cache": layer["k_cache"].clone(), "v_cache": layer["v_cache"].clone()}

    def layers(given: dict[str, Any]) -> Tensor:
        total: Tensor = attention_with_kvcache(**given, plan=plan)
        return total + attention_with_kvcache(**{**given, "v": None}, plan=plan)

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(layer), layers(other))
    assert torch.equal(layer["k_cache"].nan_to_num(7), other["k_cache"].nan_to_num(7))
