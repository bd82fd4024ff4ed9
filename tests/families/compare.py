"""Outputs of one implementation of attention held to another's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

TOLERANCE = 1e-4
"""Largest difference, as a part of the largest number in the tensor. Float32 rounds at 6e-8, and a
tiny model with large random weights makes up to a thousand times that of it. What differs by more
is compared in float64."""

EXACT = 1e-8
"""The same in float64."""

Outputs = dict[str, Tensor]


class Double(TorchFunctionMode):
    """Within it whatever asks for float32 gets float64: eager attention computes its softmax in
    float32 whatever its inputs are, and norms cast to it."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args, kwargs = tree_map(
            lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {})
        )
        return function(*args, **kwargs)


def flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every float tensor in an output, with its path."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from flatten(f"{name}.{index}" if name else str(index), inner)


def attended(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The rows of positions that are attended to, where an axis is a masked sequence's."""
    for mask in masks:
        if x.dim() < 2 or x.shape[0] != mask.shape[0]:
            continue
        if x.shape[1] == mask.shape[1]:
            return x[mask.bool()]
        if x.shape[1] == mask.shape[1] + 1:
            # A token of the model's own, at the beginning or at the end.
            wide = torch.nn.functional.pad(mask, (1, 1), value=1).bool()
            return x[wide[:, 1:] & wide[:, :-1]]
    return x


def _error(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to b's largest number; infinite where one is not finite and
    the other is: infinities mark what a model masks in its own outputs."""
    usual = b.isfinite()
    same = torch.where(usual, True, (a == b) | (a.isnan() & b.isnan()))
    if not bool(same.all()) or not bool(a[usual].isfinite().all()):
        return float("inf")
    if not bool(usual.any()):
        return 0.0
    return float((a[usual] - b[usual]).abs().max() / b[usual].abs().max().clamp_min(1e-6))


def difference(found: Outputs, expected: Outputs, masks: list[Tensor]) -> tuple[float, str]:
    """The largest difference at attended positions relative to a tensor's largest number, and the
    tensor's name."""
    if found.keys() != expected.keys():
        return float("inf"), f"outputs {sorted(found)} instead of {sorted(expected)}"
    worst = (0.0, "")
    for name, right in expected.items():
        if found[name].shape != right.shape:
            return float("inf"), f"shape of {name}"
        a, b = attended(found[name], masks), attended(right, masks)
        if a.numel():
            worst = max(worst, (_error(a, b), name))
    return worst


def step_difference(found: Outputs, expected: Outputs, _: list[Tensor]) -> tuple[float, str]:
    """The same for the scores of steps of generation, up to the first that chooses another token:
    what follows it has another prompt."""
    worst = (0.0, "")
    for name, right in expected.items():
        if name not in found:
            return float("inf"), f"no {name}"
        worst = max(worst, (_error(found[name], right), name))
        if not torch.equal(found[name].argmax(-1), right.argmax(-1)):
            break
    return worst


def gradient_difference(found: Outputs, expected: Outputs, _: list[Tensor]) -> tuple[float, str]:
    """The largest norm of a difference of parameter gradients, relative to that gradient's norm, or
    to a thousandth of the largest: some, such as a key's bias, are zero but for rounding."""
    if found.keys() != expected.keys():
        return float("inf"), f"gradients of {sorted(found.keys() ^ expected.keys())[:3]}"
    least = 1e-3 * max((float(x.norm()) for x in expected.values()), default=0.0)
    worst = (0.0, "")
    for name, right in expected.items():
        size = max(float(right.norm()), least, 1e-12)
        error = float((found[name] - right).norm()) / size
        worst = max(worst, (error if error == error else float("inf"), name))
    return worst
