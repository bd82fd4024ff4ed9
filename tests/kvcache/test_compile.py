"""torch.compile: one graph, the cache written in place and never copied; autocast; explain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import attention_with_kvcache, explain

pytestmark = [
    # Raised inside torch while it compiles.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("_fresh_compiler"),
]

LAYERS = 3


def caches(batch: int = 2) -> tuple[Tensor, Tensor]:
    """K (layers, B, T, Hkv, Dk), and one V (B, T, Hkv, Dv) that all layers share."""
    return torch.zeros(LAYERS, batch, 16, 2, 8), torch.zeros(1, batch, 16, 2, 6)


def tokens(length: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    shapes = ((batch, length, 4, 8), (batch, length, 2, 8), (batch, length, 2, 6))
    q, k, v = (torch.randn(shape) for shape in shapes)
    return q, k, v


def decode(
    backend: str, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor | int
) -> Tensor:
    """Each layer appends its keys, the first the values too."""
    total = torch.zeros(())
    for layer in range(LAYERS):
        out: Tensor = attention_with_kvcache(
            q + layer, keys[layer], values[0], k * (layer + 1), v if layer == 0 else None,
            cache_seqlens=at, window=(9, 0), backend=backend,
        )  # fmt: skip
        total = total + out
    return total


@pytest.mark.parametrize("form", ["int", "tensor"])
def test_steps_compile_whole(backend: str, form: str) -> None:
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    mine, theirs = caches(), caches()
    at = 0
    for length in (5, 1, 1, 3):
        where = at if form == "int" else torch.full((2,), at, dtype=torch.int32)
        out = compiled(backend, *tokens(length), *mine, where)
        expected = decode(backend, *tokens(length), *theirs, where)
        torch.testing.assert_close(out, expected)
        at += length
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["number", "head", "token"])
def test_excluded_and_gated_steps_compile_once(native: str, form: str) -> None:
    def step(at: int, exclusive: Any, gate: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        where = torch.full((2,), at, dtype=torch.int32)
        out: Tensor = attention_with_kvcache(
            q, keys, values, k, v, cache_seqlens=where, exclusive=exclusive, out_gate=gate,
            backend=native,
        )  # fmt: skip
        return out

    q, k, v = tokens(3)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    mine, theirs = ((keys[0], values[0]) for keys, values in (caches(), caches()))
    for at in (0, 3, 6):
        shape = {"head": (4, 1), "token": (2, 3, 4, 1)}.get(form, ())
        factor = torch.full(shape, 0.1 * at + 0.5)
        exclusive = factor if shape else float(factor)
        with torch._dynamo.config.patch(error_on_recompile=at > 3):
            got = compiled(at, exclusive, factor + 1, *mine)
        torch.testing.assert_close(got, step(at, exclusive, factor + 1, *theirs))


@pytest.mark.parametrize("given", ["nothing", "mask of 2 axes", "mask of 4 axes", "scales"])
def test_one_graph_for_every_batch(native: str, given: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, more: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if given == "scales":
            options = {"k_scale": more, "v_scale": more}
            k, v = k.to(torch.int8), v.to(torch.int8)
        elif given.startswith("mask"):
            options = {"key_mask": more > 0}
        out: Tensor = attention_with_kvcache(
            q, k, v, cache_seqlens=lengths, backend=native, **options
        )
        return out

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5, 7):
            _, k, v = tokens(16, batch)
            axes = {"mask of 4 axes": (1, 1, 16), "scales": (16, 2)}.get(given, (16,))
            lengths, more = torch.full((batch,), 16).int(), torch.randn(batch, *axes)
            arguments = (tokens(1, batch)[0], 9 * k, 9 * v, lengths, more)
            torch.testing.assert_close(compiled(*arguments), attend(*arguments))


@pytest.mark.slow
def test_inductor_writes_the_caches_in_place(native: str) -> None:
    from torch._inductor.utils import run_and_get_code

    compiled = torch.compile(decode, fullgraph=True)
    mine, theirs = caches(), caches()
    where = torch.tensor([0, 4], dtype=torch.int32)
    out, (code,) = run_and_get_code(compiled, native, *tokens(1), *mine, where)
    torch.testing.assert_close(out, decode(native, *tokens(1), *theirs, where))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
    # Each op is given a view of the caches themselves, and nothing copies them.
    assert code.count("attention_with_kvcache.default(") == LAYERS
    assert code.count("reinterpret_tensor(arg") >= 2 * LAYERS
    assert "copy_" not in code
    assert "clone" not in code


def test_autocast_follows_the_cache(backend: str) -> None:
    q, k, v = tokens(2)
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = (x.to(dtype) for x in caches())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attention_with_kvcache(
                q, keys[0], values[0], k, v, cache_seqlens=3, backend=backend
            )
        assert out.dtype == dtype
        assert torch.equal(keys[0, :, 3:5], k.to(dtype))


def test_explain_says_what_is_copied(native: str) -> None:
    _, k, v = tokens(1)
    keys, values = caches()
    wide = torch.randn(2, 1, 4, 16)[..., ::2]
    found = explain(attention_with_kvcache, wide, keys[0], values[0], k, v, cache_seqlens=0)
    assert found.backend == native
    assert found.notes == ["q is copied once: its last axis has stride 2, not 1"]
    assert (keys == 0).all()
