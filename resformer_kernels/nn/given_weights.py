"""Weights that the user of a reservoir gives: tensors, arrays, and sparse matrices of SciPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_finite, describe, integer
from resformer_kernels.nn.reservoir_matrix import ring_matrix
from resformer_kernels.nn.reservoir_weights import draw_inputs, draw_weight, scaled
from resformer_kernels.reservoir.record import RingWeight


class Draws(NamedTuple):
    """How what is not given is drawn.

    radii: spectral radius of each group of W; None: a given W is taken as it is. scaling,
    fb_scaling, bias_scaling: magnitudes of the entries of W_in (one, or one for each column), W_fb
    (likewise) and b. rc_share, input_share, fb_share: fractions of nonzero entries.
    """

    radii: list[float] | None
    scaling: list[float]
    fb_scaling: list[float]
    bias_scaling: float
    rc_share: float
    input_share: float
    fb_share: float


class GivenWeights(NamedTuple):
    """What was given, in float64 on the CPU and owned by nobody else; None where it is drawn.

    weight: W, dense (N, N), (groups, n, n) or (N,), sparse COO (N, N), or a `RingWeight`.
    input_weight: (N, n_in); feedback_weight: (N, m); bias: () or (N,). All three dense.
    """

    weight: Tensor | RingWeight | None
    input_weight: Tensor | None
    feedback_weight: Tensor | None
    bias: Tensor | None

    def units(self) -> dict[str, int]:
        """N, as each of them has it, by the argument's name."""
        weight = self.weight.values if isinstance(self.weight, RingWeight) else self.weight
        found = {}
        if weight is not None:
            found["W"] = weight.shape[0] * (weight.shape[1] if weight.dim() == 3 else 1)
        for name, value in zip(("Win", "Wfb", "bias"), self[1:], strict=True):
            if isinstance(value, Tensor) and value.dim():
                found[name] = value.shape[0]
        return found

    def columns(self, name: str) -> dict[str, int]:
        """The number of columns of Win or Wfb, by that name."""
        value = self.input_weight if name == "Win" else self.feedback_weight
        return {} if value is None else {name: value.shape[1]}

    def completed(
        self, how: Draws, topology: str, sizes: tuple[int, int, int], generator: torch.Generator
    ) -> tuple[Tensor | RingWeight, Tensor, Tensor | None, Tensor | None]:
        """(W, W_in, W_fb, b), float64; what is given is scaled as `how` says."""
        units, inputs, outputs = sizes
        weight, fed, bias = self.weight, self.feedback_weight, self.bias
        if weight is None:
            assert how.radii is not None
            weight = draw_weight(topology, units, how.rc_share, how.radii, generator)
        elif how.radii is not None:
            weight = _rescaled(weight, how.radii)
        entry = self.input_weight
        if entry is None:
            entry = draw_inputs(units, inputs, how.input_share, how.scaling, generator)
        else:
            entry = entry * entry.new_tensor(how.scaling)
        signs = torch.randint(0, 2, (units,), generator=generator) * 2 - 1
        if bias is None:
            bias = how.bias_scaling * signs.double() if how.bias_scaling else None
        elif how.bias_scaling:
            raise ValueError(f"bias_scaling must be 0 where bias is given, got {how.bias_scaling}")
        elif not bias.dim():
            bias = bias.repeat(units) if bias else None
        if fed is not None:
            fed = fed * fed.new_tensor(how.fb_scaling)
        elif outputs:
            fed = draw_inputs(units, outputs, how.fb_share, how.fb_scaling, generator)
        return weight, entry, fed, bias

    def form(self, topology: str, groups: int, layout: str) -> tuple[str, int, str]:
        """The topology, groups and layout of W, where it is given; else those asked for.

        Raises:
            ValueError: those asked for are not W's.
        """
        weight = self.weight
        if weight is None:
            return topology, groups, layout
        if isinstance(weight, RingWeight):
            found, blocks = "ring", 1
        else:
            found = "diagonal" if weight.dim() == 1 else "random"
            blocks = weight.shape[0] if weight.dim() == 3 else 1
            layout = "csr" if weight.is_sparse else layout
        for name, asked, plain, own in (
            ("topology", topology, "random", found),
            ("groups", groups, 1, blocks),
        ):
            if asked not in (plain, own):
                raise ValueError(f"{name} is {asked!r}, but W has {own!r}: leave {name} out")
        return found, blocks, layout


def read_weights(W: Any, Win: Any, Wfb: Any, bias: Any) -> GivenWeights:
    """The arguments of these names.

    Raises:
        TypeError, ValueError: one is no array of real numbers, has a wrong shape, requires a
            gradient or is not finite.
    """
    with torch.device("cpu"):
        offset = None
        if bias is not None:
            offset = _dense(_read("bias", bias))
            if offset.dim() == 2 and offset.shape[1] == 1:  # ReservoirPy's shape
                offset = offset[:, 0]
            _check_shape("bias", offset, (0, 1), "a number, (units,) or (units, 1)")
        return GivenWeights(
            None if W is None else _recurrent(W),
            None if Win is None else _matrix("Win", Win, "(units, input_dim)"),
            None if Wfb is None else _matrix("Wfb", Wfb, "(units, feedback_dim)"),
            offset,
        )


def _matrix(name: str, value: Any, axes: str) -> Tensor:
    return _check_shape(name, _dense(_read(name, value)), (2,), axes)


def agreed(name: str, asked: Any, least: int, found: Mapping[str, int]) -> int:
    """The size that the user asked for, and that the given weights have.

    Raises:
        ValueError: neither says it, or two contradict one another.
    """
    sizes = ({} if asked is None else {name: integer(name, asked, least)}) | dict(found)
    if not sizes:
        raise ValueError(f"{name} must be given: no given weight has it")
    (first, size), *others = sizes.items()
    for other, its in others:
        if its != size:
            own = f"is {size}" if first == name else f"of {first} is {size}"
            raise ValueError(f"{name} {own}, but {other} has {its}")
    return size


def _rescaled(weight: Tensor | RingWeight, radii: list[float]) -> Tensor | RingWeight:
    """W with spectral radius radii[0], or each of its groups with its own."""
    if isinstance(weight, RingWeight):
        return weight._replace(values=weight.values * _factor(ring_matrix(weight), radii[0]))
    if weight.dim() == 3:
        pairs = zip(weight, radii, strict=True)
        return torch.stack([block * _factor(block, radius) for block, radius in pairs])
    return weight * _factor(weight, radii[0])


def _factor(weight: Tensor, radius: float) -> float:
    return scaled(weight, radius, "W has spectral radius 0: it has no cycles to scale by sr")


def _recurrent(value: Any) -> Tensor | RingWeight:
    if isinstance(value, RingWeight):
        values = _check_shape("W.values", _dense(_read("W.values", value.values)), (1,), "(N,)")
        source = None
        if value.source is not None:
            source = _dense(_read("W.source", value.source)).long()
            if not torch.equal(source.sort().values, torch.arange(len(values))):
                raise ValueError(f"W.source must be a permutation of 0..{len(values) - 1}")
        return RingWeight(values, source)
    weight = _read("W", value)
    weight = weight if weight.dim() == 2 else _dense(weight)
    _check_shape("W", weight, (1, 2, 3), "(N, N), (groups, n, n), or (N,) for a diagonal")
    if weight.dim() > 1 and weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"W must be square, got shape {tuple(weight.shape)}")
    return weight


def _read(name: str, value: Any) -> Tensor:
    """`value` as finite float64 on the CPU: a copy, dense or sparse COO without duplicates."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(f"{name} gets no gradient, got {describe(value)}: detach it")
        if value.is_meta:
            raise ValueError(f"{name} must hold numbers, got {describe(value)}")
        found = value if value.layout is torch.strided else value.to_sparse()
    elif hasattr(value, "tocoo") and len(value.shape) == 2:
        entries = value.tocoo()
        places = torch.stack([torch.tensor(x).long() for x in (entries.row, entries.col)])
        numbers = torch.tensor(entries.data)
        found = torch.sparse_coo_tensor(places, numbers, entries.shape, check_invariants=True)
    else:
        try:
            # Numbers of Python would come in torch's default dtype.
            dtype = None if hasattr(value, "dtype") else torch.float64
            found = torch.tensor(value, dtype=dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} must be a tensor, an array or a sparse matrix, got {describe(value)}"
            ) from error
    if found.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {found.dtype}")
    found = found.to("cpu", torch.float64).clone()
    found = found.coalesce() if found.is_sparse else found
    check_finite(name, found.values() if found.is_sparse else found)
    return found


def _dense(value: Tensor) -> Tensor:
    return value.to_dense() if value.is_sparse else value


def _check_shape(name: str, value: Tensor, ranks: tuple[int, ...], axes: str) -> Tensor:
    if value.dim() not in ranks or 0 in value.shape[:1]:
        raise ValueError(f"{name} must be {axes}, got shape {tuple(value.shape)}")
    return value
