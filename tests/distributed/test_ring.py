"""Attention on sequences that are split across ranks equals attention on the whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from resformer_kernels import value_residual_attention
from resformer_kernels.attention import api
from resformer_kernels.distributed import ShardedSequence, context_parallel
from resformer_kernels.distributed.attention import across_ranks
from tests.distributed import ranks

ALONG = {"q": 1, "k": 1, "v": 1, "v_first": 1, "out_gate": 1}
"""The axis of each argument that is the sequence, where there is one."""


class Case(NamedTuple):
    """Inputs by name, and options."""

    inputs: dict[str, Tensor]
    options: dict[str, Any]


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def make(
    length: int,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dims: tuple[int, int] = (8, 12),
    dtype: torch.dtype = torch.float32,
    drop: tuple[str, ...] = (),
    extra: Callable[[int], dict[str, Tensor]] | None = None,
    **options: Any,
) -> Case:
    """A call of attention over `length` tokens."""
    torch.manual_seed(length)
    inputs = {
        "q": _draw(batch, length, heads, dims[0], dtype=dtype),
        "k": _draw(batch, length, kv_heads, dims[0], dtype=dtype),
        "v": _draw(batch, length, kv_heads, dims[1], dtype=dtype),
        "v_first": _draw(batch, length, kv_heads, dims[1], dtype=dtype),
    }
    inputs |= extra(length) if extra is not None else {}
    return Case({n: x for n, x in inputs.items() if n not in drop}, options)


def _scalars(_: int) -> dict[str, Tensor]:
    return {"lambda_v": torch.tensor(0.7), "lambda_first": torch.tensor([[0.4], [-1.2]])}


def _per_token(length: int) -> dict[str, Tensor]:
    return {"lambda_v": _draw(2, length, 1, 1), "lambda_first": _draw(2, length, 2, 1)}


def _finish(length: int) -> dict[str, Tensor]:
    return {
        **_scalars(length),
        "sinks": _draw(4),
        "exclusive": torch.tensor(0.8).expand(4, 1).clone(),
        "out_gate": torch.sigmoid(_draw(2, length, 4, 1)),
    }


SVFORMER = ("v",)
PLAIN = ("v_first",)
CASES = {
    "causal": make(37, extra=_scalars, causal=True),
    "causal, even": make(64, batch=1, extra=_scalars, causal=True, return_mixed_value=True),
    "bidirectional": make(30, extra=_per_token),
    "svformer": make(41, drop=SVFORMER, causal=True, return_mixed_value=True),
    "plain, softcap, scale": make(33, drop=PLAIN, causal=True, softcap=3.0, scale=-0.3),
    "window": make(50, extra=_scalars, causal=True, window=(7, 0)),
    "two-sided window": make(45, drop=SVFORMER, window=(3, 11)),
    "sinks, exclusive, gate": make(35, extra=_finish, causal=True),
    "sinks, window": make(44, extra=_finish, window=(9, 2)),
    "svformer, exclusive": make(29, drop=SVFORMER, exclusive=1.0, causal=True),
    "shorter than the ranks": make(3, extra=_scalars, causal=True),
    "one token": make(1, drop=SVFORMER, causal=True),
    "float64": make(26, extra=_finish, dtype=torch.float64, causal=True, backend="reference"),
    "float64, svformer": make(27, drop=SVFORMER, dtype=torch.float64, window=(5, 1)),
}


def whole(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of a call, and gradients of a loss of all of them, by name."""
    given: dict[str, Any] = {"v": None, **leaves, **case.options, "return_lse": True}
    found = value_residual_attention(**given)
    names = ("out", "lse", "mixed")[: len(found)]
    return dict(zip(names, found, strict=True))


def loss(results: dict[str, Tensor], positions: Tensor) -> Tensor:
    """A sum over positions that tells them apart."""
    weights = torch.cos(positions.to(results["out"].dtype))
    total = (results["out"] * weights[:, None, None]).sum()
    total = total + (results["lse"].nan_to_num(neginf=0.0) * weights).sum()
    if "mixed" in results:
        total = total + (results["mixed"].square() * weights[:, None, None]).sum()
    return total


def leaves_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}


def axis_of(name: str, x: Tensor, length: int) -> int | None:
    """Which axis of an argument is the sequence."""
    along = ALONG.get(name)
    if along is None and x.dim() == 4 and x.shape[1] == length:
        return 1
    return along


def _on_a_rank(names: list[str], balanced: bool) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in names:
        case = CASES[name]
        length = case.inputs["q"].shape[1]
        with context_parallel(dist.group.WORLD, length=length, balanced=balanced) as sequence:
            found[name] = _one(case, sequence, length)
    return found


def _one(case: Case, sequence: ShardedSequence, length: int) -> dict[str, Tensor]:
    parts = {}
    for name, x in case.inputs.items():
        axis = axis_of(name, x, length)
        parts[name] = x if axis is None else sequence.shard(x, axis)
    leaves = leaves_of(parts)
    results = whole(case, leaves)
    inputs = {x.data_ptr() for x in leaves.values() if x.numel()}
    assert not inputs & {x.data_ptr() for x in results.values()}
    loss(results, sequence.positions).backward()
    found = {}
    for name, x in results.items():
        found[name] = sequence.gather(x.detach(), 2 if name == "lse" else 1)
    for name, leaf in leaves.items():
        axis = axis_of(name, case.inputs[name], length)
        assert leaf.grad is not None, name
        if axis is None:
            dist.all_reduce(leaf.grad)
        found[f"d{name}"] = leaf.grad if axis is None else sequence.gather(leaf.grad, axis)
    return found


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_results_and_gradients_are_those_of_the_whole(world: int, balanced: bool) -> None:
    every = ranks.run(world, _on_a_rank, list(CASES), balanced)
    for name, case in CASES.items():
        leaves = leaves_of(case.inputs)
        results = whole(case, leaves)
        loss(results, torch.arange(case.inputs["q"].shape[1])).backward()
        expected = {n: x.detach() for n, x in results.items()}
        expected |= {f"d{n}": x.grad for n, x in leaves.items() if x.grad is not None}
        for found in every:
            assert found[name].keys() == expected.keys()
            for part, x in expected.items():
                wide = x.dtype is torch.float64
                scale = x.nan_to_num(neginf=0.0).abs().max().item()
                torch.testing.assert_close(
                    found[name][part],
                    x,
                    rtol=0,
                    atol=(1e-13 if wide else 3e-6) * max(scale, 1e-3) * 4,
                    msg=partial("{}, {}: {}".format, name, part),
                )


GATHERED = {
    f"{name}, {length} tokens": make(
        length, extra=None if drop else _per_token, drop=drop, causal=True, backend="sdpa", **more
    )
    for length in (3, 26)
    for name, drop, more in (
        ("resformer", (), {"exclusive": 0.7}),
        ("svformer", SVFORMER, {"window": (9, 0)}),
    )
}


def _by_torch(case: Case, inputs: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """out, and the gradients of a loss of it: the LSE has none there."""
    leaves = leaves_of(inputs)
    given: dict[str, Any] = {"v": None, **leaves, **case.options}
    out = value_residual_attention(**given)
    (out * torch.cos(positions)[:, None, None]).sum().backward()
    gradients = {f"d{n}": x.grad for n, x in leaves.items() if x.grad is not None}
    return {"out": out.detach(), **gradients}


def _gathered_on_a_rank() -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, case in GATHERED.items():
        length = case.inputs["q"].shape[1]
        with context_parallel(dist.group.WORLD, length=length) as sequence:
            parts = {n: sequence.shard(x, 1) for n, x in case.inputs.items()}
            results = _by_torch(case, parts, sequence.positions)
            found[name] = {n: sequence.gather(x, 1) for n, x in results.items()}
    return found


def test_torchs_attention_gets_every_rank_s_keys() -> None:
    every = ranks.run(4, _gathered_on_a_rank)
    for name, case in GATHERED.items():
        wanted = _by_torch(case, case.inputs, torch.arange(case.inputs["q"].shape[1]))
        for found in every:
            assert found[name].keys() == wanted.keys()
            for part, x in wanted.items():
                torch.testing.assert_close(found[name][part], x, rtol=1e-5, atol=1e-5)


def test_auto_prefers_the_ring() -> None:
    names = [x.NAME for x in across_ranks(api._SDPA_FIRST)]
    assert names == ["native", "triton", "sdpa", "reference"]
    assert [x.NAME for x in across_ranks(api._FLASH_ATTENTION_FIRST)] == names


HALF = {
    f"{str(dtype).removeprefix('torch.')}, {name}": make(
        70, extra=None if drop else _finish, drop=drop, causal=True, dtype=dtype
    )
    for dtype in (torch.bfloat16, torch.float16)
    for name, drop in (("resformer", ()), ("svformer", SVFORMER))
}


def _half_on_a_rank(balanced: bool) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, case in HALF.items():
        with context_parallel(dist.group.WORLD, length=70, balanced=balanced) as sequence:
            found[name] = _one(case, sequence, 70)
    return found


def test_in_half_precision_the_error_is_that_of_one_process() -> None:
    every = ranks.run(3, _half_on_a_rank, True)
    for name, case in HALF.items():
        single: dict[str, Tensor] = {}
        exact: dict[str, Tensor] = {}
        for results, double in ((single, False), (exact, True)):
            inputs = {n: x.double() if double else x for n, x in case.inputs.items()}
            leaves = leaves_of(inputs)
            given = whole(case, leaves)
            loss(given, torch.arange(70)).backward()
            results |= {n: x.detach().double() for n, x in given.items()}
            results |= {f"d{n}": x.grad.double() for n, x in leaves.items() if x.grad is not None}
        for part, x in exact.items():
            if part[1:] in ("lambda_v", "lambda_first", "sinks", "exclusive"):
                continue  # Cancelling sums over all tokens: float32 tests them.
            scale = x.abs().max().item()
            error = (single[part] - x).abs().max().item()
            for found in every:
                across = (found[name][part].double() - x).abs().max().item()
                # A partial result is rounded once more before it is merged.
                assert across <= 2 * error + 4e-3 * scale, (name, part, across, error, scale)
