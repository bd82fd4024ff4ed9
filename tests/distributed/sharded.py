"""A call on DTensors, held to the same call in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import resformer_kernels as ours
from tests.distributed import ranks

Split = tuple[str, ...]
"""For each axis of a mesh the letters of the axes that are split on it."""


class Given(NamedTuple):
    """An argument: the letter of each axis, its size, and what its entries are."""

    axes: str
    shape: tuple[int, ...]
    kind: str = "normal"

    def make(self, seed: int) -> Tensor:
        """The tensor; one of floats is a leaf, unless it is constant."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "offsets":
            # Three sequences, one of them empty, and a row after the last.
            return torch.tensor([0, 3, 3, 8], dtype=torch.int32)
        if self.kind == "pages":
            pages = torch.arange(self.shape[0] * self.shape[1], dtype=torch.int32)
            return pages.flip(0).view(self.shape)
        if self.kind.isdigit():
            return torch.randint(int(self.kind), self.shape, generator=generator, dtype=torch.int32)
        x = torch.randn(self.shape, generator=generator)
        if self.kind == "mask":
            # The last key is seen by all: no row is empty.
            x[..., -1] = 1
            return x > -0.5
        if "gate" in self.kind:
            x = 0.3 + 0.6 * x.sigmoid()
        if "weight" in self.kind:
            x = 0.5 * x / self.shape[-1] ** 0.5
        return x.requires_grad_("constant" not in self.kind)


class Case(NamedTuple):
    """A call of a public function; `tensors` holds an argument, or a list of them, by name."""

    function: str
    tensors: dict[str, Any]
    options: dict[str, Any] = {}  # noqa: RUF012

    def make(self) -> dict[str, Any]:
        """The tensors by name."""
        made: dict[str, Any] = {}
        for i, (name, given) in enumerate(self.tensors.items()):
            if isinstance(given, list):
                made[name] = [
                    x.make(100 * i + j) if isinstance(x, Given) else x for j, x in enumerate(given)
                ]
            else:
                made[name] = given.make(i) if isinstance(given, Given) else given
        return made


def place(x: Any, given: Any, mesh: DeviceMesh, split: Split) -> Any:
    """x on the mesh, split where it has an axis to split."""
    if isinstance(x, list):
        return [place(a, b, mesh, split) for a, b in zip(x, given, strict=True)]
    if not isinstance(x, Tensor):
        return x
    axes = given.axes if isinstance(given, Given) else ""
    placements = []
    for letters in split:
        at = [i for i, a in enumerate(axes) if a in letters and x.shape[i] > 1]
        placements.append(Shard(at[0]) if at else Replicate())
    return distribute_tensor(x.detach().clone(), mesh, placements).requires_grad_(x.requires_grad)


def listed(result: Any) -> list[Any]:
    return [y for x in result for y in listed(x)] if isinstance(result, (tuple, list)) else [result]


def _loss(results: Sequence[Any]) -> Any:
    # The LSE of a row without keys is -inf.
    return sum((1 + i) * x.double().clamp(min=-99).sin().sum() for i, x in enumerate(results))


def close(found: Any, expected: Tensor, what: str) -> None:
    whole = found.full_tensor() if isinstance(found, DTensor) else found
    assert whole.shape == expected.shape, what
    if not expected.is_floating_point():
        assert torch.equal(whole, expected), what
        return
    finite = expected.isfinite()
    assert torch.equal(whole[~finite], expected[~finite]), what
    scale = expected[finite].abs().amax().item() if finite.any() else 0.0
    error = (whole - expected)[finite].abs().amax().item() if finite.any() else 0.0
    assert error <= 2e-5 * scale + 1e-6, f"{what}: {error} of {scale}"


def _is_sum(x: DTensor) -> bool:
    return any(place.is_partial() for place in x.placements)


def compare(case: Case, mesh: DeviceMesh, split: Split, **options: Any) -> int:
    """Assert that a call on the mesh is that of one process; collectives of its forward."""
    function = getattr(ours, case.function)
    one = case.make()
    parts = {name: place(x, case.tensors[name], mesh, split) for name, x in one.items()}
    expected = listed(function(**one, **case.options, **options))
    with CommDebugMode() as moved:
        found = listed(function(**parts, **case.options, **options))
    where = f"{case.function} {dict(case.tensors)} {case.options} on {split}"
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert isinstance(x, DTensor)
        close(x, y, f"result {i} of {where}")
    for x, y in zip(listed(list(parts.values())), listed(list(one.values())), strict=True):
        if isinstance(y, Tensor):
            close(x.detach(), y.detach(), f"argument after {where}")
    leaves = [x for x in listed(list(one.values())) if isinstance(x, Tensor) and x.requires_grad]
    if leaves:
        _loss(expected).backward()
        _loss(found).backward()
        for x, y in zip(listed(list(parts.values())), listed(list(one.values())), strict=True):
            if isinstance(y, Tensor) and y.requires_grad:
                alike = x.grad.placements == x.placements
                assert alike or (moved.get_total_counts() and not _is_sum(x.grad)), where
                assert y.grad is not None
                close(x.grad, y.grad, f"gradient of {tuple(y.shape)} of {where}")
    return moved.get_total_counts()


def _compare_all(
    shape: tuple[int, ...], calls: Sequence[tuple[Case, Split, bool]], options: dict[str, Any]
) -> list[str]:
    """On every rank: calls whose forward moved something though none should (the third of each), or
    moved nothing though it must."""
    mesh = init_device_mesh("cpu", shape)
    return [
        f"{case.function} {dict(case.tensors)} {split}: {moved}"
        for case, split, still in calls
        if ((moved := compare(case, mesh, split, **options)) == 0) is not still
    ]


def hold(shape: tuple[int, ...], calls: Sequence[tuple[Case, Split, bool]], **options: Any) -> None:
    world = 1
    for size in shape:
        world *= size
    for found in ranks.run(world, _compare_all, shape, calls, options):
        assert found == []


def attention(
    batch: int = 4, heads: int = 4, kv_heads: int = 4, time: int = 5, **others: Any
) -> Case:
    """All of q, k, v and v_first; `others` are tensors or options."""
    q, k = (batch, time, heads, 8), (batch, time, kv_heads, 8)
    tensors = {"q": Given("bthd", q), **{n: Given("bthd", k) for n in ("k", "v", "v_first")}}
    more = {name: x for name, x in others.items() if isinstance(x, Given)}
    options = {name: x for name, x in others.items() if name not in more}
    return Case("value_residual_attention", {**tensors, **more}, options)
