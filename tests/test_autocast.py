"""Dtypes that autocast leaves side by side: what a Linear made is 16-bit, the rest float32."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import (
    KVLayout,
    RingWeight,
    SharedValueCache,
    attention_with_kvcache,
    linear_scan,
    mix_value_embedding,
    mix_values,
    reservoir_scan,
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.models import LanguageModel, LanguageModelConfig

SHORT = [torch.bfloat16, torch.float16]
short = pytest.mark.parametrize("dtype", SHORT, ids=lambda d: str(d).split(".")[1])
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)
VALUES = {name: draw(2, 5, 2, 8, seed=i) for i, name in enumerate(("q", "k", "v", "v_first"))}
EXTRAS = {"lambda_v": draw(2, 1), "sinks": draw(2), "attn_bias": draw(5, 5)}
RESERVOIR = {
    "inputs": draw(2, 5, 3),
    "weight": draw(4, 4) / 4,
    "input_weight": draw(4, 3),
    "leak": draw(4).sigmoid(),
    "bias": draw(4),
    "initial_state": draw(2, 4),
}


def packed(**tensors: Any) -> Any:
    rows = {name: x[0] if name in VALUES else x for name, x in tensors.items()}
    sizes: dict[str, Any] = {
        "cu_seqlens_q": OFFSETS,
        "cu_seqlens_k": OFFSETS,
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
    }
    return value_residual_attention_varlen(**rows, **sizes)


def mixed(**tensors: Tensor) -> Tensor:
    *values, first, second = tensors.values()
    return mix_values(values, [first, second])


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "attention": (value_residual_attention, {**VALUES, **EXTRAS}),
    "packed attention": (packed, {**VALUES, "lambda_v": draw(2, 1), "sinks": draw(2)}),
    "mix_values": (
        mixed,
        {"v": VALUES["v"], "v_first": VALUES["k"], "own": draw(2, 1), "first": draw()},
    ),
    "mix_value_embedding": (
        lambda **x: mix_value_embedding(token_ids=torch.tensor([[0, 1, 2, 3, 0]] * 2), **x),
        {"v": VALUES["v"], "table": draw(4, 2, 8), "gate": draw(2, 5, 2, 1)},
    ),
    "linear_scan": (
        linear_scan,
        {"gates": draw(2, 5, 4).sigmoid(), "tokens": draw(2, 5, 4), "initial_state": draw(2, 4)},
    ),
    "reservoir_scan": (reservoir_scan, RESERVOIR),
}


@short
@pytest.mark.parametrize(
    ("name", "argument"), [(name, x) for name, (_, tensors) in CALLS.items() for x in tensors]
)
@pytest.mark.usefixtures("native")
def test_each_argument_in_the_dtype_of_autocast(
    name: str, argument: str, dtype: torch.dtype
) -> None:
    """Beside float32 ones, and it alone float32 beside 16-bit ones."""
    function, tensors = CALLS[name]
    for alone, others in ((dtype, torch.float32), (torch.float32, dtype)):
        leaves = {n: x.to(alone if n == argument else others) for n, x in tensors.items()}
        leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
        with torch.autocast("cpu", dtype=dtype):
            result = function(**leaves)
        out = result if isinstance(result, Tensor) else result[0]
        gradients = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
        assert [g.dtype for g in gradients] == [x.dtype for x in leaves.values()]
        assert out.isfinite().all()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("q", "new"), [*product([torch.float32, torch.bfloat16], repeat=2)])
def test_a_cache_keeps_its_dtype(
    cache_dtype: torch.dtype, q: torch.dtype, new: torch.dtype, native: str
) -> None:
    x = VALUES["q"]
    cache = torch.zeros(2, 9, 2, 8, dtype=cache_dtype)
    scales: dict[str, Any] = {}
    if cache_dtype is torch.int8:
        scales = {"k_scale": torch.zeros(2, 9, 2), "v_scale": torch.zeros(2, 9, 2)}
    held = SharedValueCache(
        KVLayout.standard(1), batch=2, max_seqlen=9, num_kv_heads=2, head_dim=8, dtype=cache_dtype
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_with_kvcache(
            x.to(q), cache, cache.clone(), x.to(new), x.to(new), cache_seqlens=0, backend=native,
            **scales,
        )  # fmt: skip
        kept = held.attend(0, x.to(q), x.to(new), x.to(new), backend=native)
    assert out.dtype == (torch.bfloat16 if cache_dtype is torch.int8 else cache_dtype)
    assert torch.equal(kept, out)


def test_a_model_generates_under_autocast(native: str) -> None:
    config = LanguageModelConfig(
        variant="svformer", vocab_size=16, dim=16, num_layers=2, num_heads=2, backend=native
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = LanguageModel(config).generate(torch.tensor([[1, 2, 3]]), 3)
    assert drawn.tokens.shape == (1, 3)


PROMOTED = [*FLOATS, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize(("gates", "tokens"), [*product(PROMOTED, repeat=2)], ids=str)
def test_scans_promote_as_torch_does(gates: torch.dtype, tokens: torch.dtype) -> None:
    """But for float32 gates beside 16-bit tokens, which are read as they are."""
    expected = torch.promote_types(gates, tokens)
    if gates is torch.float32 and tokens in SHORT:
        expected = tokens
    g = draw(1, 4, 3).sigmoid().to(gates).requires_grad_()
    x = draw(1, 4, 3, seed=1).to(tokens).requires_grad_()
    for first in (None, *PROMOTED):
        h = None if first is None else draw(1, 3).to(first).requires_grad_()
        states, final = linear_scan(g, x, h)
        dtype = expected
        if first is not None and not (first is torch.float32 and expected in SHORT):
            dtype = torch.promote_types(expected, first)
        assert states.dtype is dtype
        assert final.dtype is (torch.float32 if dtype in SHORT else dtype)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        exact, _ = linear_scan(g.to(wide), x.to(wide), None if h is None else h.to(wide))
        torch.testing.assert_close(states.to(wide), exact, rtol=2e-2, atol=2e-2)
        leaves = [leaf for leaf in (g, x, h) if leaf is not None]
        found = torch.autograd.grad(states.abs().square().sum(), leaves)
        assert [one.dtype for one in found] == [leaf.dtype for leaf in leaves]


def test_backends_serve_promoted_scans(backend: str) -> None:
    gates, tokens = draw(2, 5, 4).sigmoid().bfloat16(), draw(2, 5, 4)
    states, final = linear_scan(gates, tokens, draw(2, 4).half(), backend=backend)
    expected = linear_scan(gates.float(), tokens, draw(2, 4).half().float(), backend=backend)
    assert torch.equal(states, expected[0])
    assert torch.equal(final, expected[1])
    compiled = torch.compile(linear_scan, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gates, tokens)[0], linear_scan(gates, tokens)[0])


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_16_bit_arguments_of_a_reservoir_are_exact(backend: str) -> None:
    """Every form of weight, and each vector."""
    weights: list[Any] = [
        draw(4, 4).half(),
        draw(2, 2, 2).half(),
        draw(4).half(),
        draw(4, 4).half().to_sparse_csr(),
        RingWeight(draw(4).half()),
    ]
    vectors: dict[str, Any] = {
        name: RESERVOIR[name].bfloat16() for name in ("leak", "bias", "initial_state")
    }
    options: dict[str, Any] = {"backend": backend, "input_weight": RESERVOIR["input_weight"].half()}
    for weight in weights:
        found = reservoir_scan(RESERVOIR["inputs"], weight, **vectors, **options)
        wide: Any = weight
        wide = RingWeight(weight.values.float()) if isinstance(weight, RingWeight) else wide.float()
        options_32 = options | {"input_weight": options["input_weight"].float()}
        expected = reservoir_scan(
            RESERVOIR["inputs"], wide, **{n: x.float() for n, x in vectors.items()}, **options_32
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
