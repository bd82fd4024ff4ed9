"""DTensors through every op of the package, forward and backward.

Importing this package tells `torch.distributed.tensor` how each op may run on parts of its
arguments, by the table in `sharding_rules`; a public function that is given a DTensor imports it.
From then on torch does the rest: of the placements that a rule allows it takes those that move the
fewest bytes, moves what is placed otherwise, and runs the op on what each rank holds. Nothing moves
where arguments are split alike.

On each axis of a mesh an op is split in one way: by sequences, by heads, by channels, or not at
all. An argument without the axis that is split, or of size 1 there, is whole on every rank; its
gradient is then a sum over ranks (`Partial`), which `_core.gradient` makes before it leaves the
op's backward.

`register_sharding` of torch cannot say this: it forgets masks that are lists of ints, and has no
place for results that are lists. The calls beneath it are used here instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import (
    OpSchema,
    OpSpec,
    OpStrategy,
    RuntimeSchemaInfo,
    TupleStrategy,
)
from torch.distributed.tensor._ops.utils import generate_redistribute_costs

from resformer_kernels._core.op import NATIVE, OPS, TRITON, Op, field_names
from resformer_kernels.distributed.sharding_rules import OF_A_PART, RULES, Result, Rule

WHOLE = ""
"""The letters of no axis: every rank computes the whole."""


def register() -> None:
    """Register the rule of every op, in both of its namespaces."""
    for op in OPS.values():
        for namespace in (NATIVE, TRITON):
            overload = getattr(getattr(torch.ops, namespace), op.name).default
            DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
                overload, partial(_strategy, op), _cached_by(overload)
            )


def _cached_by(overload: Any) -> RuntimeSchemaInfo:
    """torch keeps what a rule said by the placements and shapes of tensors, and by all arguments
    from a place on: here from the first that can decide what the op returns. Numbers do not, and
    those before it may differ from step to step."""
    kinds = [str(argument.type) for argument in overload._schema.arguments]
    undecided = ("Tensor", "Optional[Tensor]", "List[Tensor]", "float", "List[float]")
    deciding = [i for i, kind in enumerate(kinds) if kind not in undecided]
    return RuntimeSchemaInfo(
        static_argnum=min(deciding, default=len(kinds)), needs_pytree="List[Tensor]" in kinds
    )


def _strategy(op: Op, schema: OpSchema) -> OpStrategy:
    """Every placement that the op's rule allows for these arguments, with what it costs."""
    rule = RULES.get(op.name, OF_A_PART)
    if isinstance(rule, str):
        raise RuntimeError(f"{op.function}: {rule}")
    # A list of tensors and a tensor are both described by objects of torch's.
    values = [x.children if isinstance(x, TupleStrategy) else x for x in schema.args_schema]
    found = rule(op.read(tuple(values)))
    tensors = list(_tensors(field_names(op.record), values, found))
    mesh = schema.get_mesh_from_args()
    extents = _extents(tensors)
    written = {
        a.name for a in schema.op._schema.arguments if a.alias_info and a.alias_info.is_write
    }
    several = _returns_several(schema)
    specs = []
    for letters in itertools.product(*_offered(found.splits, tensors, mesh.ndim)):
        if not all(_divides(split, letters, mesh, extents) for split in set(letters)):
            continue
        inputs = [
            DTensorSpec(
                mesh,
                tuple(_place(axes, x.shape, split, name in found.shared) for split in letters),
                tensor_meta=x.tensor_meta,
            )
            for name, axes, x in tensors
        ]
        moved = {
            name
            for (name, _, x), spec in zip(tensors, inputs, strict=True)
            if spec.placements != x.strategies[0].output_spec.placements
        }
        if moved & written:
            continue
        outputs = tuple(
            DTensorSpec(mesh, tuple(_outcome(result, extents, split) for split in letters))
            for result in found.results
        )
        specs.append(
            OpSpec(
                outputs if several else outputs[0],
                inputs,
                [
                    generate_redistribute_costs(x, spec)
                    for (_, _, x), spec in zip(tensors, inputs, strict=True)
                ],
            )
        )
    if not specs:
        raise RuntimeError(_unwritable(op, tensors, written))
    return OpStrategy(specs)


def _tensors(
    names: Iterable[str], values: Sequence[Any], rule: Rule
) -> Iterator[tuple[str, str | None, OpStrategy]]:
    """(name, axes or None, description) of every tensor of a call, in torch's order."""
    for name, value in zip(names, values, strict=True):
        axes = rule.arguments.get(name)
        if isinstance(value, OpStrategy):
            assert not isinstance(axes, list)
            yield name, axes, value
        elif isinstance(value, (list, tuple)):
            for i, one in enumerate(value):
                if isinstance(one, OpStrategy):
                    yield f"{name}[{i}]", None if axes is None else axes[i], one


def _offered(
    splits: Iterable[str], tensors: Iterable[tuple[str, str | None, OpStrategy]], mesh_axes: int
) -> list[list[str]]:
    """The ways to split the op on each axis of the mesh: those in which an argument is split there
    already. Others would move more than they save."""
    offered: list[list[str]] = [[WHOLE] for _ in range(mesh_axes)]
    for split in splits:
        for i, ways in enumerate(offered):
            for _, axes, x in tensors:
                place = x.strategies[0].output_spec.placements[i]
                if isinstance(place, Shard) and axes and axes[place.dim] in split:
                    ways.append(split)
                    break
    return offered


def _returns_several(schema: OpSchema) -> bool:
    returned = schema.op._schema.returns
    return len(returned) > 1 or str(returned[0].type) == "List[Tensor]"


def _extents(tensors: Iterable[tuple[str, str | None, OpStrategy]]) -> dict[str, Any]:
    """The size of every letter."""
    found: dict[str, Any] = {}
    for _, axes, x in tensors:
        for letter, size in zip(axes or "", x.shape if axes else (), strict=True):
            found[letter] = max(found.get(letter, 0), size)
    return found


def _divides(split: str, letters: Sequence[str], mesh: DeviceMesh, extents: dict[str, Any]) -> bool:
    """Whether axes of these letters can be split on the mesh axes that `letters` has them on."""
    if split == WHOLE:
        return True
    if max(extents.get(letter, 0) for letter in split) <= 1:
        return False
    if split == "b":
        # Ranks without sequences have nothing to do.
        return True
    sizes = [mesh.size(i) for i, letter in enumerate(letters) if letter == split]
    first = _parts(extents[split[0]], sizes)
    nonempty = all(start < stop for start, stop in first)
    if len(split) == 1 or (split == "hk" and extents.get("k", 1) == 1):
        # One KV head serves all query heads, wherever they are.
        return nonempty
    few, many = ("k", "h") if split == "hk" else ("g", "u")
    ratio = extents[many] // extents[few]
    owners = [(ratio * start, ratio * stop) for start, stop in _parts(extents[few], sizes)]
    return nonempty and owners == _parts(extents[many], sizes)


def _parts(extent: Any, sizes: Iterable[int]) -> list[tuple[Any, Any]]:
    """(start, stop) of an axis on every rank, split by one mesh axis after another as torch does:
    the first ranks have the most."""
    parts = [(0, extent)]
    for size in sizes:
        split = []
        for start, stop in parts:
            step = -((start - stop) // size)
            ends = [min(start + i * step, stop) for i in range(size + 1)]
            split += list(itertools.pairwise(ends))
        parts = split
    return parts


def _place(axes: str | None, shape: Sequence[Any], split: str, shared: bool) -> Placement:
    """Where a tensor of these axes is on a mesh axis with this split. Where it has no part in the
    split, every rank has the whole, or, if it is `shared`, something of which it is the sum."""
    for axis, letter in enumerate(axes or ""):
        if letter in split and shape[axis] != 1:
            return Shard(axis)
    return Partial() if split and shared else Replicate()


def _outcome(result: Result, extents: dict[str, Any], split: str) -> Placement:
    shape = result.shape
    if shape is None:
        shape = tuple(extents.get(letter, 1) for letter in result.axes)
    return _place(result.axes, shape, split, result.adds_up)


def _unwritable(
    op: Op, tensors: Iterable[tuple[str, str | None, OpStrategy]], written: set[str]
) -> str:
    placed = ", ".join(
        f"{name} {x.strategies[0].output_spec.placements}"
        for name, _, x in tensors
        if name in written
    )
    return (
        f"{op.function} writes in place, and so moves none of the tensors that it writes: they "
        f"must be split by KV heads or, where a cache is contiguous, by sequences, all alike, or "
        f"not at all; got {placed}"
    )
